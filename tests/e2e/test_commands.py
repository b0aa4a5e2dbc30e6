"""Commands beside a running server use its database; without one they run the database themselves."""

from __future__ import annotations

import grpc
import pytest
from tests.support.service import Template, service

from outrider.v1 import tenant_pb2, tenant_service_pb2, tenant_service_pb2_grpc

pytestmark = [pytest.mark.e2e, pytest.mark.postgres, pytest.mark.timeout(120)]


async def test_commands_work_beside_a_running_server(fresh_state: Template) -> None:
    with service(fresh_state) as running:
        running.start()
        await running.ready(30)
        postmaster = running.postmaster_pid()

        made = running.run_command("create-admin-key", "--name", "beside")
        assert made.returncode == 0, made.stderr
        key = made.stdout.strip()
        assert key.startswith("ork_beside_")
        async with grpc.aio.insecure_channel(running.listen_address) as channel:
            await tenant_service_pb2_grpc.TenantServiceStub(channel).CreateTenant(  # type: ignore[no-untyped-call]
                tenant_service_pb2.CreateTenantRequest(
                    tenant_id="acme", tenant=tenant_pb2.Tenant()
                ),
                metadata=[("authorization", f"Bearer {key}")],
                timeout=10,
            )

        assert running.balance_printed() == {"acme": [0, 0, 0, 0, 0, 0]}
        migrated = running.run_command("migrate")
        assert (migrated.returncode, migrated.stdout.strip()) == (0, "up to date"), migrated.stderr

        nodes = running.run_command("nodes")
        assert nodes.returncode == 0, nodes.stderr
        head, *rows = nodes.stdout.splitlines()
        assert head.split()[:4] == ["node", "address", "lease", "shards"]
        (row,) = rows
        assert row.split()[4:6] == ["64", "0"]  # behind name, address, and the lease in seconds
        by_shard = running.run_command("nodes", "--shards").stdout.splitlines()
        assert len(by_shard) == 65
        assert by_shard[1].split()[0] == "0"
        let_go = running.run_command("let-go")
        assert (let_go.returncode, let_go.stdout.strip()) == (1, "nothing is held back")
        wrong = running.run_command("let-go", "--shard", "64")
        assert wrong.returncode == 2

        again = running.run_command("create-admin-key", "--name", "beside")
        assert again.returncode == 1
        assert len(again.stderr.splitlines()) == 1
        assert "already" in again.stderr

        assert running.running
        assert running.postmaster_pid() == postmaster, "the commands left the database alone"
        assert await running.terminate(30) == 0
        assert running.run_command("balance").returncode == 0


async def test_a_second_server_on_a_state_folder_is_still_refused(fresh_state: Template) -> None:
    with service(fresh_state) as running:
        running.start()
        await running.ready(30)
        second = running.run_command(
            "serve", "--listen-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0"
        )
        assert second.returncode == 1
        assert f"is in use by process {running.pid}" in second.stderr.splitlines()[-1]
        assert running.running
