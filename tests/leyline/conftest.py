"""One hand-written example of every message, with fixed ids and times: the golden files hold their bytes."""

import pytest

from esper import leyline as ll

SEEDS = ("blocks.0.mlp#0.0", "blocks.0.mlp#0.1", "blocks.1.mlp#0.0")
SITE = ll.SiteInfo(module_path="blocks.0.mlp", module_type="MLP", layout="btd", width=64, input_width=32, depth=0.25)
EFFECT = ll.Counterfactual(mean=0.02, lower=0.01, upper=0.03, n=256)
HARDWARE = ll.HardwareContext(device_type="cpu", device_name="test", memory_available_gb=1.5, supports_bf16=True)
RUN = {"run_id": "run-1", "epoch": 3, "step": 120}
KERNEL = {"kernel_artifact_id": "ab12-cpu-standard-0f", "blueprint_id": "ab12"}
COMPILATION = ll.CompilationRecord(
    pipeline="standard",
    compilation_seconds=8.5,
    cpu_seconds=15.25,
    peak_memory_mb=512.0,
    toolchain_version="torch 2.13.0",
    optimization_flags=("-O3",),
)
VERDICT = ll.UrabraskValidationReport(
    kernel_artifact_id="ab12-cpu-standard-0f",
    benchmark_results=ll.BenchmarkResults(
        latency_ms_mean=0.5,
        latency_ms_p99=0.75,
        throughput_ops_per_sec=2000.0,
        memory_mb_peak=4.0,
        precision_drift=1e-6,
    ),
    generated_tags=("fast",),
    baseline_comparison={"latency": 0.8},
    passed_validation=True,
    risk_score=0.125,
    conf_level=0.5,
    hardware_context=HARDWARE,
    report_timestamp=1.75e9,
)
SPEC = ll.KernelSpec(ir="{}", layout="btd", d_in=64, d_out=64, tokens=128, kind="linear", dims={"h": 16})
PACKET = ll.SystemStatePacket(
    run_id="run-1",
    current_epoch=3,
    global_step=120,
    train_loss=1.5,
    validation_loss=1.75,
    metrics={"validation_accuracy": 0.5},
    hardware_context=HARDWARE,
    seed_states=ll.SeedTable.of(SEEDS, state=[4, 6, 0], alpha=[0.5, 1.0, 0.0], last_epoch=[2, 3, -1], ready=[0, 1, 0]),
    health_map=ll.HealthMap.of(**{name: [0.25, 0.5, 0.75] for name in ll.HEALTH_COLUMNS}),
    site_paths=("blocks.0.mlp", "blocks.1.mlp"),
    site_health=ll.HealthMap.of(**{name: [0.5, 0.75] for name in ll.HEALTH_COLUMNS}),
    memory_pressure={"cpu": 0.5, "cuda:0": 0.75},
    edges=ll.Edges.of(
        ("blocks.0.mlp", "blocks.1.mlp"),
        [(3, 0, ll.EdgeKind.CONTAINS), (3, 4, ll.EdgeKind.LAYER_FORWARD), (0, 1, ll.EdgeKind.SEQUENTIAL)],
    ),
    sites=(SITE,),
    last_decisions=("germinate BP-MLP-GELU: the loss is flat",),
    evidence={SEEDS[1]: EFFECT},
    budget=ll.Budget(max_params=10_000, used_params=4_096, in_progress=1),
)
COMMAND = ll.KasminaControlCommand(
    command_id="c0ffee",
    command=ll.SeedCommand.GERMINATE,
    target_layer_id="blocks.0.mlp",
    target_seed_id=SEEDS[0],
    blueprint_id="BP-MLP-GELU",
    grafting_strategy="fixed_ramp",
    dims={"h": 16},
    reads="input",
    init_seed=7,
    group="trial-1",
)
REPORT = ll.FieldReport(
    run_id="run-1",
    blueprint_id="BP-MLP-GELU",
    kernel_artifact_id="ab12-cpu-fast-0f",
    seed_id=SEEDS[0],
    site=SITE,
    pre_metric=1.75,
    post_metric=1.5,
    counterfactual=EFFECT,
    outcome=ll.SeedState.FOSSILIZED,
    reason=ll.Reason.GATE_PASSED,
    cost=ll.Cost(params=4096, flops=8192, latency_ms=0.25),
    stage_epochs={ll.SeedState.GRAFTING: 2},
    stage_steps={ll.SeedState.GRAFTING: 80},
    eval_metrics={"price": 0.001},
    grafting_strategy="fixed_ramp",
    dims={"h": 16},
    group="trial-1",
    site_kind="mlp",
)
TRANSITION = ll.SeedTransitioned(
    **RUN,
    seed_id=SEEDS[0],
    kernel_artifact_id="ab12-cpu-fast-0f",
    blueprint_id="BP-MLP-GELU",
    source=ll.SeedState.EVALUATING,
    target=ll.SeedState.CULLED,
    command=ll.SeedCommand.CULL,
    reason=ll.Reason.OUTCOMPETED,
    detail="BP-CONV-CAUSAL helps more for its price",
    group="trial-1",
)
DECISION = ll.DecisionMade(
    **RUN,
    policy="heuristic",
    commands=("c0ffee",),
    explanation="the loss is flat",
    candidates=(ll.Candidate(seed_id=SEEDS[0], blueprint_id="BP-MLP-GELU", score=0.5, chosen=True, why="best prior"),),
)
EXAMPLES = {
    type(example).__name__: example
    for example in (
        PACKET,
        COMMAND,
        REPORT,
        TRANSITION,
        DECISION,
        HARDWARE,
        COMPILATION,
        VERDICT,
        ll.AdaptationSignal(optimizer_rebuild_required=True, reason="a child joined"),
        ll.HealthSignal(
            layer_id="blocks.0.mlp",
            seed_id=SEEDS[0],
            epoch=3,
            step=120,
            metrics={"dead_node_ratio": 0.125},
            is_ready_for_transition=True,
        ),
        ll.KernelQuery(blueprint_id="ab12", required_tags=("fast",), max_latency_ms=1.0, layout="btd", dims={"d": 64}),
        ll.KernelQueryResult(
            matching_kernels=("k1", "k2"), ranked=(ll.RankedKernel(kernel_artifact_id="k2", score=0.5, why="fast"),)
        ),
        ll.Blueprint(id="ab12", name="BP-MLP-GELU", ir="{}", parents=("aa",), interest_scores={"karn": 0.5}),
        ll.CompiledKernelArtifact(
            id="ab12-cpu-standard-0f",
            name="BP-MLP-GELU",
            status=ll.ArtifactStatus.VALIDATED,
            blueprint_id="ab12",
            compilation_pipeline="standard",
            kernel_ref="9f",
            compilation_record=COMPILATION,
            validation_report=VERDICT,
        ),
        ll.EpochEvent(
            **RUN, train_loss=1.5, validation_loss=1.75, metrics={"validation_accuracy": 0.5}, duration_s=2.5
        ),
        ll.GraftFaulted(**RUN, seed_id=SEEDS[0], fault=ll.Fault.NOT_FINITE, detail="NaN in the output"),
        ll.RolledBack(
            **RUN, trigger=ll.RollbackTrigger.LOSS_SPIKE, restored_epoch=2, restored_step=80, locked_seeds=SEEDS[:1]
        ),
        ll.BlueprintSubmitted(blueprint_id="ab12", name="BP-MLP-GELU", submitter="karn"),
        ll.KernelReady(**KERNEL, pipeline="standard", compilation_seconds=8.5),
        ll.KernelCharacterized(**KERNEL, tags=("fast",), risk_score=0.125, conf_level=0.5),
        ll.KernelRejected(**KERNEL, reason=ll.Rejection.GRADIENT_MISMATCH, detail="differs from eager by 0.1"),
        ll.WorkerDied(pool="tezzeret", worker_id="w1", job_id="j1", attempt=1, exit_code=-9, requeued=True),
        ll.SlowConsumer(consumer="nissa", topic=ll.TELEMETRY_SEED_HEALTH, queued=1000, dropped=12, lag_s=1.5),
        ll.SecurityAlert(source="loader", subject="ab12", violation=ll.Violation.SIGNATURE, detail="no such key"),
        SPEC,
        ll.KernelManifest(
            kernel_id="ab12-cpu-standard-0f",
            name="BP-MLP-GELU",
            blueprint_id="ab12",
            spec=SPEC,
            pipeline="standard",
            toolchain="torch 2.13.0",
            fingerprint="f0",
            parameters=("up.weight",),
            forward_outputs=2,
            backward_wiring=("i0", "o1", "t0"),
            files={"fw.so": "9f"},
            serial=7,
            created=1.75e9,
        ),
        ll.Attestation(
            kernel_artifact_id="ab12-cpu-standard-0f",
            artifact_hash="9f",
            status=ll.ArtifactStatus.VALIDATED,
            role=ll.Role.URABRASK,
            serial=8,
            signature=b"signed",
        ),
        ll.CompilationRequest(spec=SPEC, pipeline="standard", interest=0.75, requester="run-1"),
        ll.CompiledKernel(manifest="{}", files={"fw.so": b"ELF"}, record="{}"),
        ll.KernelFaulted(kernel_artifact_id="ab12-cpu-standard-0f", run_id="run-1", detail="NaN in the output"),
        ll.BlueprintRequest(layout="btd", tier="standard", max_params=4096, d_in=64, d_out=64, kind="mlp"),
        ll.BlueprintAnswer(names=("BP-MLP-GELU",), conservative=True, why="Karn did not answer"),
        ll.Envelope(
            id="e1",
            topic=ll.CONTROL_KASMINA_COMMANDS,
            sender="tamiyo",
            time=1.75e9,
            trace_id="t1",
            priority=ll.Priority.EMERGENCY,
            kind="KasminaControlCommand",
            payload=ll.encode(COMMAND),
        ),
    )
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that takes `example` once per message."""
    if "example" in metafunc.fixturenames:
        metafunc.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)


@pytest.fixture
def packet() -> ll.SystemStatePacket:
    """A packet of three seeds in two layers."""
    return PACKET
