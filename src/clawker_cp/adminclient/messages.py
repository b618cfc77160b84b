"""
The wire messages, for callers of the client: `admin` and `control`, and their JSON form.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict

from clawker_cp._proto.clawker.admin.v1 import admin_pb2 as admin
from clawker_cp._proto.clawker.control.v1 import control_pb2 as control

__all__ = ["admin", "control", "to_json"]


def to_json(message: Any) -> dict[str, Any]:
    """
    A message as JSON values: original field names, enums by name, zero values left out.
    """
    mapping: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return mapping
