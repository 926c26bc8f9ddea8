"""The table of environment variables, the search for Ascend's software, and devices that are not there."""

from __future__ import annotations

import os

import pytest

from polymodal import recipe
from polymodal.core.errors import PolymodalError
from polymodal.runtime import cann as cann_module
from polymodal.runtime import device, environment


@pytest.mark.parametrize(
    "name, value, written",
    [
        ("HCCL_CONNECT_TIMEOUT", 120, "120"),
        ("HCCL_CONNECT_TIMEOUT", "7200", "7200"),
        ("HCCL_EXEC_TIMEOUT", 68, "68"),
        ("HCCL_EXEC_TIMEOUT", 17340, "17340"),
        ("ACLNN_CACHE_LIMIT", 10_000_000, "10000000"),
        ("TASK_QUEUE_ENABLE", 2, "2"),
        ("NPU_ASD_ENABLE", 3, "3"),
        ("ASCEND_GLOBAL_LOG_LEVEL", 4, "4"),
        ("ASCEND_LAUNCH_BLOCKING", True, "1"),
        ("TOKENIZERS_PARALLELISM", False, "false"),
        ("TOKENIZERS_PARALLELISM", "True", "true"),
        ("CPU_AFFINITY_CONF", "1,npu_affine:1", "1,npu_affine:1"),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:128", "expandable_segments:True,max_split_size_mb:128"),
        ("CUDA_DEVICE_MAX_CONNECTIONS", 2, "2"),
    ],
)  # fmt: skip
def test_documented_values_are_set(name, value, written):
    environ: dict[str, str] = {}
    assert environment.apply(recipe.Device(env={name: value}), environ) == {name: written}
    assert environ == {**environment.DEFAULTS, name: written}


def test_what_the_shell_sets_stays_where_the_recipe_does_not():
    own = {"THP_MEM_ALLOC_ENABLE": "0", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}
    environ = dict(own)
    environment.apply(recipe.Device(), environ)
    assert environ == environment.DEFAULTS | own
    environment.apply(recipe.Device(env={"THP_MEM_ALLOC_ENABLE": True}), environ)
    assert environ == environment.DEFAULTS | own | {"THP_MEM_ALLOC_ENABLE": "1"}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("HCCL_CONNECT_TIMEOUT", 119, "HCCL_CONNECT_TIMEOUT = 119 is outside its range, 120 to 7,200"),
        ("HCCL_CONNECT_TIMEOUT", 7201, "outside its range"),
        ("HCCL_CONNECT_TIMEOUT", "soon", "HCCL_CONNECT_TIMEOUT = soon is outside its range"),
        ("HCCL_EXEC_TIMEOUT", 67, "68 to 17,340"),
        ("HCCL_EXEC_TIMEOUT", 17341, "68 to 17,340"),
        ("ACLNN_CACHE_LIMIT", 0, "1 to 10,000,000"),
        ("ACLNN_CACHE_LIMIT", 10_000_001, "1 to 10,000,000"),
        ("TASK_QUEUE_ENABLE", 3, "TASK_QUEUE_ENABLE = 3 is not one of 0, 1, 2"),
        ("NPU_ASD_ENABLE", 4, "not one of 0, 1, 2, 3"),
        ("CPU_AFFINITY_CONF", "3", "not one of 0, 1, 2"),
        ("TOKENIZERS_PARALLELISM", "yes please", "neither true nor false"),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segment:True", "Did you mean expandable_segments:"),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments", "not of the form name:value"),
        ("TASK_QUEUE_ENABLED", 1, "TASK_QUEUE_ENABLED is not a known environment variable. Did you mean TASK_QUEUE_ENABLE?"),
        ("SOMETHING", 1, "polymodal doctor --env"),
        ("MASTER_PORT", 29501, "export MASTER_PORT=29501"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_and_nothing_is_set(name, value, message):
    environ: dict[str, str] = {}
    with pytest.raises(PolymodalError) as caught:
        environment.apply(recipe.Device(env={"TOKENIZERS_PARALLELISM": True, name: value}), environ)
    assert message in str(caught.value)
    assert environ == {}


DOCUMENTED = (
    "ASCEND_SLOG_PRINT_TO_STDOUT ASCEND_GLOBAL_LOG_LEVEL TASK_QUEUE_ENABLE COMBINED_ENABLE "
    "CPU_AFFINITY_CONF HCCL_CONNECT_TIMEOUT PYTORCH_NPU_ALLOC_CONF HCCL_EXEC_TIMEOUT "
    "ACLNN_CACHE_LIMIT TOKENIZERS_PARALLELISM MULTI_STREAM_MEMORY_REUSE NPU_ASD_ENABLE "
    "ASCEND_LAUNCH_BLOCKING NPUS_PER_NODE CUDA_DEVICE_MAX_CONNECTIONS MASTER_ADDR MASTER_PORT "
    "NNODES NODE_RANK"
)


def test_every_documented_variable_is_in_the_table():
    names = [variable.name for variable in environment.VARIABLES.values()]
    assert set(DOCUMENTED.split()) <= set(names) and len(set(names)) == len(names)
    assert all(variable.what and variable.allowed for variable in environment.VARIABLES.values())


def test_defaults_of_the_table_are_in_their_own_range():
    for variable in environment.VARIABLES.values():
        if variable.default and not variable.shell:
            assert environment.check(variable.name, variable.default) == variable.default


def install(root, part: str, version: str = "8.2.RC1"):
    directory = root / part
    directory.mkdir(parents=True)
    (directory / "set_env.sh").write_text("export ASCEND_HOME_PATH=...\n")
    (directory / "version.cfg").write_text(f"# header\nruntime_running_version=[1.2:{version}]\n")
    return directory / "set_env.sh"


@pytest.mark.parametrize("part", ["cann", "ascend-toolkit", "ascend-toolkit/latest", "nnae"])
def test_cann_is_found_under_its_roots(tmp_path, part):
    script = install(tmp_path, part)
    atb = tmp_path / "nnal/atb"
    atb.mkdir(parents=True)
    (atb / "set_env.sh").write_text("")
    cann = cann_module.find_cann((str(tmp_path),), {})
    assert (cann.toolkit, cann.atb, cann.version, cann.sourced) == (
        script,
        atb / "set_env.sh",
        "8.2.RC1",
        False,
    )
    assert cann.command == f"source {script} && source {atb / 'set_env.sh'}"


def test_cann_is_found_by_its_own_variable_and_known_to_be_sourced(tmp_path):
    script = install(tmp_path / "elsewhere", "ascend-toolkit/latest")
    home = str(script.parent)
    assert cann_module.find_cann(("/nonexistent",), {"ASCEND_HOME_PATH": home}).toolkit == script
    assert not cann_module.find_cann(("/nonexistent",), {"ASCEND_HOME_PATH": home}).sourced
    assert cann_module.find_cann(
        ("/nonexistent",), {"ASCEND_HOME_PATH": home, "LD_LIBRARY_PATH": f"{home}/lib64:/usr/lib"}
    ).sourced


def test_no_cann():
    cann = cann_module.find_cann(("/nonexistent",), {})
    assert cann.toolkit is None and cann.command == ""


def test_a_device_that_is_not_there():
    if device.find().kind != "cpu":
        pytest.skip("has an accelerator")
    for kind in ("cuda", "npu"):
        with pytest.raises(PolymodalError, match="torch sees cpu here.*polymodal doctor"):
            device.find(kind)
    assert device.find("cpu").torch.type == "cpu" and device.count() == 1


def test_a_driver_whose_devices_torch_does_not_see_is_no_cpu(tmp_path, monkeypatch):
    """Else `auto` would train on the CPU without a word."""
    if device.find("cpu") and device._accelerator() is not None:
        pytest.skip("has an accelerator")
    file = tmp_path / "nvidiactl"
    monkeypatch.setattr(device, "DRIVERS", {str(file): "CUDA_VISIBLE_DEVICES"})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device.find("auto").kind == "cpu"
    file.touch()
    with pytest.raises(
        PolymodalError, match=r"A driver is loaded .*nvidiactl.*sees no device.*device.kind: cpu"
    ):
        device.find("auto")
    rows = {row[0]: row for row in device.survey()}
    assert rows["accelerator"][1] == "fail" and "sees no device" in rows["accelerator"][2]
    assert device.find("cpu").kind == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert device.find("auto").kind == "cpu"


def test_an_older_torch_has_no_packed_kernel(monkeypatch):
    """Its varlen_attn takes fewer arguments: attention then goes by lengths."""
    import torch.nn.attention.varlen as varlen

    assert device._varlen_is_whole()
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, a, b, c, d, is_causal=False: None)
    assert not device._varlen_is_whole()


def test_deterministic_is_strict(monkeypatch):
    """As a warning only it changes neither flash attention's backward nor cuBLAS."""
    import torch

    for name in ("CUBLAS_WORKSPACE_CONFIG", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        device.make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["HCCL_DETERMINISTIC"]) == (
            ":4096:8",
            "true",
        )
    finally:
        torch.use_deterministic_algorithms(False)


def test_grouped_queries_of_float32_take_a_fused_kernel_on_accelerators(monkeypatch):
    import torch

    from polymodal.distributed import attention

    asked = []
    monkeypatch.setattr(
        attention,
        "scaled_dot_product_attention",
        lambda q, k, v, **options: asked.append((k.shape[1], options["enable_gqa"])) or q,
    )
    for dtype in (torch.float32, torch.bfloat16):
        q, k = (torch.empty(2, heads, 5, 8, dtype=dtype, device="meta") for heads in (4, 2))
        attention._kernel(q, k, k, True, None, 0.0)
    attention._kernel(
        torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8), True, None, 0.0
    )
    assert asked == [(4, False), (2, True), (2, True)]


def test_memory_and_threads():
    import torch

    now = device.memory(device.find("cpu"))
    assert 0 < now["now"] <= now["peak"]
    before = torch.get_num_threads()
    try:
        assert device.set_threads(None, 10**6) == 1 and torch.get_num_threads() == 1
        assert device.set_threads(2, 1) == 2
    finally:
        torch.set_num_threads(before)


def test_environment_reaches_a_started_run(monkeypatch):
    from polymodal.runtime import process_group

    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "5")
    rt = process_group.start(
        recipe.validate({"model": {"source": "x"}, "device": {"env": {"HCCL_CONNECT_TIMEOUT": 300}}}),
        process=process_group.ALONE,
    )
    process_group.stop(rt)
    assert os.environ["HCCL_CONNECT_TIMEOUT"] == "300"
