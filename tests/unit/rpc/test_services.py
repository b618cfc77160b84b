"""The services of this process and the scopes of their methods belong together."""

from __future__ import annotations

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from clawker_cp.auth.scopes import admin_method_scopes, agent_method_scopes, control_method_scopes
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.server import served_methods
from clawker_cp.rpc.services import HealthService, admin_service, agent_service, control_service
from clawker_cp.rpc.transport import grpc
from clawker_cp.testing.rpc_world import Authority


class Everything:
    """A servicer of any service."""

    def __getattr__(self, name: str) -> object:
        return lambda request, context: None


def test_each_service_serves_what_its_map_names() -> None:
    """Neither a method without a scope nor a scope without a method."""
    servicer = Everything()
    assert served_methods([admin_service(servicer)]) == set(admin_method_scopes())
    assert served_methods([control_service(servicer)]) == set(control_method_scopes())
    assert served_methods([agent_service(servicer)]) == set(agent_method_scopes())


async def test_the_operators_listener_may_start() -> None:
    """Its two maps together leave no method of its two services out; one alone does."""
    servicer = Everything()
    served = served_methods([admin_service(servicer), control_service(servicer)])
    both = AuthInterceptor(Authority(), {**admin_method_scopes(), **control_method_scopes()})
    assert both.unmapped(served) == []
    assert len(AuthInterceptor(Authority(), admin_method_scopes()).unmapped(served)) == len(control_method_scopes())


async def test_health_says_how_the_whole_is_and_that_each_service_serves() -> None:
    """Unknown before, then SERVING; a failed part turns the whole alone; after the end nothing serves again."""
    health = HealthService(["a.Service"])
    server = grpc.aio.server()
    health(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = HealthStub(channel)

        async def said() -> list[str]:
            found = []
            for name in ("", "a.Service"):
                try:
                    answer = await stub.Check(HealthCheckRequest(service=name), timeout=5)
                    found.append(HealthCheckResponse.ServingStatus.Name(answer.status))
                except grpc.aio.AioRpcError as error:
                    found.append(error.code().name)
            return found

        assert (await said())[1] == "NOT_FOUND"
        await health.serve()
        assert await said() == ["SERVING", "SERVING"]
        await health.tell(healthy=False)
        assert await said() == ["NOT_SERVING", "SERVING"]
        await health.tell(healthy=True)
        assert await said() == ["SERVING", "SERVING"]
        await health.leave()
        await health.tell(healthy=True)
        assert await said() == ["NOT_SERVING", "NOT_SERVING"]
    await server.stop(0)
