"""What the agent daemon does at its start, as a program of its own: nothing of ours in it but the messages."""

from __future__ import annotations

_REGISTER = """
import json, ssl, sys, urllib.parse, urllib.request
import grpc
from clawker_cp._proto.clawker.agent.v1 import agent_pb2
place, assertion, agent, project = sys.argv[1:]
read = lambda name: open(place + "/" + name, "rb").read()
tls = ssl.create_default_context(cafile=place + "/ca.pem")
tls.check_hostname = False  # the daemon dials a name that the address stands for here
form = urllib.parse.urlencode({
    "grant_type": "client_credentials", "scope": "agent:self:register", "client_assertion": assertion,
    "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
}).encode()
answer = urllib.request.urlopen("https://GATEWAY:4444/oauth2/token", form, context=tls, timeout=10)
token = json.load(answer)["access_token"]
credentials = grpc.ssl_channel_credentials(read("ca.pem"), read("leaf.key"), read("leaf.pem"))
options = [("grpc.ssl_target_name_override", "clawker-controlplane")]
with grpc.secure_channel("GATEWAY:7444", credentials, options=options) as channel:
    call = channel.unary_unary("/clawker.agent.v1.AgentService/Register")
    message = agent_pb2.RegisterRequest(agent_name=agent, project=project).SerializeToString()
    try:
        call(message, metadata=(("authorization", "Bearer " + token),), timeout=10)
        print(json.dumps(["OK", ""]))
    except grpc.RpcError as error:
        print(json.dumps([error.code().name, error.details()]))
"""


def daemon_program(gateway: str) -> str:
    """
    Python that gets a token for the assertion it was given and calls Register, with the certificate in its place.

    Its arguments are the place, the assertion, and the names of agent and project; it prints the status and what
    is said with it, as a JSON list.
    """
    return _REGISTER.replace("GATEWAY", gateway)
