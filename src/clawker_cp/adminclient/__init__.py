"""
The client of AdminService and ControlService: mTLS, tokens, a clock probe; synchronous and asynchronous.
"""

from clawker_cp.adminclient.client import AdminClient, AsyncAdminClient
from clawker_cp.adminclient.failures import RpcFailed
from clawker_cp.adminclient.identity import ClientIdentity

__all__ = ["AdminClient", "AsyncAdminClient", "ClientIdentity", "RpcFailed"]
