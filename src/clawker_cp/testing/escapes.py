"""
What tests of escapes run inside sandboxes and beside the server; pieces of Python as text.
"""

from __future__ import annotations

DATABASE, DATAGRAMS, EVIL = "203.0.113.30", "203.0.113.31", "203.0.113.66"

# A packet socket passes no hook of a cgroup; our system call filter lets nobody make one.
FRAMES = frozenset({
    "packet_socket_frame", "packet_socket_spoofed", "packet_socket_by_its_old_name", "vlan_tagged_frame",
})  # fmt: skip
# A send may return before the packet is dropped: then only the world can say, and it is asked.
SEND_RETURNS = FRAMES | {"source_route_option", "broadcast", "multicast", "gateway_services"}
# No hook of a cgroup sees these families: a system call filter alone stops them. Every sandbox has ours unless a test
# says no; the default one of older Docker engines lets AF_VSOCK through.
FILTER_ALONE = frozenset({"vsock_listen"})

# Shared by the bodies below: a sandbox that runs Python, and reading its output by lines.
START = """
async def start(agent, code, **more):
    made = await client.call("CreateSandbox", C.CreateSandboxRequest(
        project="esc", agent=agent, argv=["/usr/bin/python3", "-u", "-c", code],
        workdir=WORK, auto_remove=True, **more))
    async def requests():
        yield C.AttachSandboxRequest(id=made.sandbox.id)
        await asyncio.Event().wait()
    return made.sandbox, client.stream("AttachSandbox", requests())

class Lines:
    def __init__(self, stream):
        self.stream, self.rest, self.code = stream, "", None
    async def next(self):
        while "\\n" not in self.rest:
            message = await anext(self.stream)
            if message.WhichOneof("item") == "exit_code":
                self.code = message.exit_code
                raise EOFError(self.rest)
            self.rest += message.output.decode()
        line, _, self.rest = self.rest.partition("\\n")
        return line.strip()
    async def until(self, *wanted):
        while True:
            line = await self.next()
            if line in wanted:
                return line

async def remove(sandbox):
    await client.call("RemoveSandbox", C.RemoveSandboxRequest(id=sandbox.id, force=True, grace_seconds=1))

async def flows(sandbox, **more):
    found = []
    request = C.WatchFlowsRequest(last=10000, filter=C.FlowFilter(agents=[], **more))
    async for item in client.stream("WatchFlows", request):
        if item.flow.container_id == sandbox.id:
            found.append(told(item.flow))
    return found
"""

# A TCP connection and a UDP socket that go on sending what they were opened for.
GOING_ON = f"""
import socket, time
tcp = udp = None
while True:
    try:
        if tcp is None:
            tcp = socket.create_connection(("{DATABASE}", 5432), 2)
            tcp.settimeout(1)
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            udp.connect(("{DATAGRAMS}", 5000))
        tcp.send(b"x" * 10 + b"\\n")
        udp.send(b"mark")
        print("sent")
    except OSError as error:
        print("stopped")
    time.sleep(0.05)
"""
