from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from support import scripted_server as script
from support.adapter_files import write_folder
from turret.v1 import adapters_pb2
from turret_client import Client


def test_list_is_an_aligned_table(turret, server):
    server.adapters = [
        script.BROKEN,
        script.PIRATE,
        adapters_pb2.Adapter(
            name="soft",
            revision="abc",
            state=adapters_pb2.ADAPTER_STATE_STAGED,
            method=adapters_pb2.ADAPTER_METHOD_PROMPT_TUNING,
            num_parameters=999,
            num_virtual_tokens=20,
            file_bytes=1023,
            arena_bytes=1024,
            traffic_split=adapters_pb2.TrafficSplit(revision="def0123456789abc", percent=10),
        ),
    ]
    assert turret("adapters", "list").stdout.splitlines() == [
        "NAME    STATE     METHOD         REVISION      RANK  VIRTUAL  PARAMETERS      FILE    ARENA  ACTIVE",
        "broken  failed    unspecified    -                -        -           0       0 B      0 B       0",
        "pirate  resident  lora           0123456789ab    16        -        4.5M  17.2 MiB  9.0 MiB       2",
        "soft    staged    prompt_tuning  abc              -       20         999    1023 B  1.0 KiB       0",
        f"broken: {script.BROKEN.error}",
        f"pirate: 10 % of the requests go to {script.PIRATE.traffic_split.revision}",
        "soft: 10 % of the requests go to def012345678",
    ]


def test_list_json_is_an_object_a_line(turret, server):
    server.adapters = [adapters_pb2.Adapter(name=f"a{index}") for index in range(5)]
    lines = turret("adapters", "list", "--json").stdout.splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["a0", "a1", "a2", "a3", "a4"]


def test_list_of_nothing(turret, server):
    server.adapters = []
    assert turret("adapters", "list").output == "no adapters\n"
    assert turret("adapters", "list", "--json").output == ""


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (
            ("load", "pirate", "/srv/pirate"),
            adapters_pb2.LoadAdapterRequest(name="pirate", path="/srv/pirate"),
        ),
        (("unload", "pirate"), adapters_pb2.UnloadAdapterRequest(name="pirate")),
        (("show", "pirate"), adapters_pb2.GetAdapterRequest(name="pirate")),
        (("rollback", "pirate"), adapters_pb2.RollbackAdapterRequest(name="pirate")),
        (
            ("rollback", "pirate", "01234567"),
            adapters_pb2.RollbackAdapterRequest(name="pirate", revision="01234567"),
        ),
        (
            ("split", "pirate", "01234567", "--percent", "10"),
            adapters_pb2.SetTrafficSplitRequest(name="pirate", revision="01234567", percent=10),
        ),
        (
            ("split", "pirate", "--percent", "0"),
            adapters_pb2.SetTrafficSplitRequest(name="pirate", percent=0),
        ),
    ],
)
def test_load_unload_show_rollback_and_split_print_the_adapter(turret, server, arguments, request_):
    human = turret("adapters", *arguments)
    machine = turret("adapters", *arguments, "--json")
    assert human.exit_code == machine.exit_code == 0
    assert server.requests == [request_, request_]
    assert "9.0 MiB" in human.stdout
    with Client(server.address) as client:
        assert json.loads(machine.stdout) == json.loads(json.dumps(asdict(client.get_adapter("pirate"))))


def test_show_prints_all_fields(turret):
    assert turret("adapters", "show", "pirate").stdout.splitlines() == [
        "name            pirate",
        "state           resident",
        "method          lora",
        "revision        0123456789abcdef0123456789abcdef",
        "rank            16",
        "virtual tokens  -",
        "tasks           -",
        "vocabulary      -",
        "tokenizer       the base model's",
        "parameters      4,500,000",
        "file            17.2 MiB",
        "arena           9.0 MiB",
        "active          2",
        "draining        fedcba, abcdef",
        "split           10 % go to 4567",
        "history         1970-01-01 00:00:01+00:00  0123  /srv/pirate",
    ]


def test_upload_sends_a_folder(turret, server, tmp_path):
    write_folder(tmp_path, b"tensors")
    result = turret("adapters", "upload", "pirate", str(tmp_path), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["name"] == "pirate"
    assert server.uploaded == b"tensors"
    (tmp_path / "adapter_model.safetensors").unlink()
    result = turret("adapters", "upload", "pirate", str(tmp_path))
    assert result.exit_code == 2
    assert "adapter_model.safetensors: no such file" in result.stderr


def test_watch_prints_each_change(turret):
    assert turret("adapters", "watch").stdout.splitlines() == [
        "pirate  resident  0123456789ab  draining fedcba, abcdef",
        "broken  failed  adapter_config.json is not JSON",
    ]
    printed = turret("adapters", "watch", "--json").stdout.splitlines()
    assert [json.loads(line)["name"] for line in printed] == ["pirate", "broken"]


def test_a_split_needs_its_revision(turret, server):
    result = turret("adapters", "split", "pirate", "--percent", "10")
    assert (result.exit_code, server.requests) == (2, [])
    assert "Give the REVISION for 10 % of the requests; `turret adapters show pirate` lists them." in (
        " ".join(result.stderr.split())
    )
