"""The benchmark's arithmetic, and one tiny run of it from end to end."""

import json
import math
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks import bench_losses, candidates, cases, check, measure, report, train_step  # noqa: E402


def case(loss="tnkd", shape="2x3x4x4", layout="contiguous", dtype="fp32", phase=cases.FORWARD_BACKWARD):
    return cases.Case(loss, shape, layout, dtype, phase)


def measured(of: cases.Case, name: str, ms: float, extra: int = 0, device: str = "cpu", copy_gb_s: float = 10.0):
    """One entry of the JSON file, every quantile the same."""
    return {
        "loss": of.loss,
        "shape": of.shape,
        "layout": of.layout,
        "dtype": of.dtype,
        "phase": of.phase,
        "device": device,
        "candidate": name,
        "kind": "backend" if name in cases.BACKENDS else "baseline",
        "auto": "native",
        "floor_bytes": of.floor_bytes,
        "student_bytes": of.student_bytes,
        "extra_bytes": extra,
        "copy_gb_s": copy_gb_s,
        "ms": dict.fromkeys(("min", "p10", "p25", "median", "p75", "p90", "max"), ms),
    }


def result(measurements, device="cpu"):
    machine = {
        "device": device,
        "name": "a machine",
        "threads": 2,
        "torch": "2",
        "date": "2026-01-01T",
        "cache_bytes": 1,
    }
    return {"machine": machine, "settings": {"copy": "copy_", "memory": "peak"}, "measurements": measurements}


def test_floor_counts_what_must_move():
    pixels, logits = 2 * 4 * 4, 2 * 3 * 4 * 4
    assert case().floor_bytes == 3 * 4 * logits + 8 * pixels  # student, teacher, gradient; int64 labels
    assert case(phase=cases.FORWARD).floor_bytes == 2 * 4 * logits + 8 * pixels
    assert case(dtype="bf16").floor_bytes == 3 * 2 * logits + 8 * pixels
    assert case("cafd").floor_bytes == 4 * 4 * logits  # the student is read again for its gradient
    assert case("matched").floor_bytes == 5 * 4 * logits + 8 * pixels  # both logits are read again
    small = case("lowres", "2x3x4x4+2x3x2x2")  # student and gradient, the smaller teacher, labels of 512 x 512
    assert small.floor_bytes == 2 * 4 * logits + 4 * 2 * 3 * 2 * 2 + 8 * 2 * 512 * 512
    assert small.student_bytes == 4 * logits == case("lowres", "2x3x4x4", dtype="bf16").student_bytes
    assert case("lowres-tnkd", "2x3x4x4@8x16").floor_bytes == 3 * 4 * logits + 8 * 2 * 8 * 16
    assert case("lowres-dsct", "2x3x4x4@8x16").floor_bytes == 5 * 4 * logits + 8 * 2 * 8 * 16
    joined = case("dsct", "2x3x4x4+2x5x2x2")
    assert joined.floor_bytes == case("jaccard").floor_bytes + 4 * 4 * (2 * 5 * 2 * 2)
    assert joined.student_bytes == 4 * (logits + 2 * 5 * 2 * 2)


@pytest.mark.parametrize(
    "text", ["4x6", "4x6x0x2", "ax6x2x2", "4x6x2x2+1x1x1x1+1x1x1x1", "4x6x2x2@8", "4x6x2x2@0x8", ""]
)
def test_bad_shape_is_named(text):
    with pytest.raises(ValueError, match="shape: expected"):
        cases.parse_shape(text)


def test_cases_asked_for():
    full = cases.make_cases(cases.LOSSES, "cpu")
    assert len(full) == len(set(full))
    assert {c.shape for c in full if c.loss == "tnkd"} == set(cases.SHAPES["tnkd"])
    assert {c.layout for c in full if c.shape == "128x100x1x1"} == {"contiguous"}
    assert any(c.shape == "16x150x512x512" for c in cases.make_cases(["tnkd"], "cuda"))
    only = cases.make_cases(["tnkd", "cafd"], "cpu", shapes=["2x3x4x4+1x1x2x2"])
    assert only == []  # a pair of shapes fits dsct alone
    small = cases.make_cases(cases.LOSSES, "cpu", shapes=["1x6x16x16@64x64", "1x6x16x16@15x64"])
    assert {(c.loss, c.shape, c.dtype) for c in small} == {(loss, "1x6x16x16@64x64", "fp32") for loss in cases.LOWRES}
    assert full[0].loss == "lowres" and full[0].labels == (4, 512, 512) and small[0].labels == (1, 64, 64)
    quick = cases.make_cases(cases.LOSSES, "cpu", quick=True)
    assert {(c.layout, c.dtype, c.phase) for c in quick} == {("contiguous", "fp32", cases.FORWARD_BACKWARD)}


def test_inputs_have_the_layout_and_the_gradient_asked_for():
    x = cases.make_inputs(case(layout="channels_last", dtype="bf16"), torch.device("cpu"))
    assert x.student_logits.is_contiguous(memory_format=torch.channels_last) and not x.student_logits.is_contiguous()
    assert x.student_logits.requires_grad and not x.teacher_logits.requires_grad
    assert x.student_logits.dtype == torch.bfloat16
    forward = cases.make_inputs(case(phase=cases.FORWARD), torch.device("cpu"))
    assert not forward.student_logits.requires_grad


def test_mask_trick_is_the_same_loss_where_it_is_safe():
    x = cases.make_inputs(case(shape="2x5x8x8", dtype="fp64"), torch.device("cpu"))
    got = candidates.mask_trick_dkd(x.student_logits, x.teacher_logits, x.target)
    want = candidates.reference_loss("tnkd")(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(loss, x.student_logits)[0] for loss in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "loss,shape",
    [
        ("tnkd", "2x5x8x8"),
        ("kd", "2x5x8x8"),
        ("cafd", "2x5x8x8"),
        ("matched", "2x5x8x8"),
        ("jaccard", "2x5x8x8"),
        ("dsct", "2x5x8x8+2x4x4x4"),
        *((loss, shape) for loss in cases.LOWRES for shape in ("1x3x8x8+1x3x9x4@16x16", "1x3x9x9@33x17")),
    ],
)
def test_baseline_and_public_function_compute_the_same(loss, shape):
    lowres = loss in cases.LOWRES
    x = cases.make_inputs(case(loss, shape, dtype="fp64"), torch.device("cpu"))
    # upsampled in float32 or better by the library, in float32 by the baseline
    tolerance = dict(rtol=1e-5, atol=0) if lowres else {}
    got, want = candidates.backend_loss(loss, "reference")(x), candidates.reference_loss(loss)(x)
    torch.testing.assert_close(got, want, check_dtype=not lowres, **tolerance)


@pytest.mark.parametrize("loss", cases.LOWRES)
@pytest.mark.parametrize("shape", ["1x3x8x8+1x3x9x4@16x16", "1x3x9x9@33x17"])
def test_the_old_path_computes_the_same_and_the_full_size_kernel_has_logits_of_its_own(loss, shape):
    bench = measure.Bench(case(loss, shape, "channels_last"), torch.device("cpu"))
    every = candidates.make_candidates(loss, candidates.default_baselines(loss), ("native",))
    assert list(every) == ["compile", "beforehand", "cross-entropy", "full-size", "native"]
    (ours,), (before,), (full,) = (bench.call(every[name]) for name in ("native", "beforehand", "full-size"))
    torch.testing.assert_close(ours, before, rtol=1e-4, atol=1e-7)
    assert ours.shape == (1, 3, *cases.parse_shape(shape)[0][2:]) and full.shape[2:] == cases.label_size(shape)
    assert bench.inputs[0].student_logits.shape == ours.shape  # the others' inputs are as they were
    if loss != "lowres-dsct":  # whose other parts are of the logits' own size
        upsampled = candidates.at_labels(bench.inputs[0].student_logits, bench.inputs[0])
        (down,) = torch.autograd.grad(upsampled, bench.inputs[0].student_logits, full)
        torch.testing.assert_close(down, ours, rtol=1e-4, atol=1e-7)
    with_ce, alone = every["cross-entropy"](bench.inputs[0]), candidates.reference_loss("lowres")(bench.inputs[0])
    tnkd = candidates.reference_loss("lowres-tnkd")(bench.inputs[0])
    torch.testing.assert_close(with_ce + tnkd, alone)


def test_turns_are_spread_evenly():
    turns = measure.interleave({"a": 8, "b": 2, "c": 1})
    assert sorted(turns) == ["a"] * 8 + ["b"] * 2 + ["c"]
    assert turns[:5].count("b") == 1 and turns.index("c") in (4, 5, 6)


def test_quantiles():
    timing = measure.Timing.of([0.004, 0.001, 0.002, 0.003, 0.005], calls=7)
    assert (timing.samples, timing.calls) == (5, 7)
    assert [timing.min, timing.p25, timing.median, timing.p75, timing.max] == pytest.approx([1, 2, 3, 4, 5])
    assert timing.p10 == pytest.approx(1.4)


def test_others_load_is_not_our_own():
    with measure.OthersLoad() as load:
        assert load._clock() is None or load._clock()[0] > 0
    load._before, load._clock = (0.0, 0.0, 0.0), lambda: (8.0, 10.0, 5.0)  # of 10 s busy for 8, 5 of them ours
    load.__exit__()
    assert load.share == pytest.approx(0.3)


def test_peak_memory_sees_what_is_alive_at_once():
    x = torch.zeros(1 << 18)  # 1 MiB
    slack = 1024
    one = measure.cpu_peak_bytes(lambda: x + 1)
    two = measure.cpu_peak_bytes(lambda: (x + 1) * 2)
    assert x.nbytes <= one < x.nbytes + slack
    assert 2 * x.nbytes <= two < 2 * x.nbytes + slack


def test_peak_memory_of_the_reference_exceeds_its_gradient():
    of = case(shape="2x6x32x32")
    bench = measure.Bench(of, torch.device("cpu"))
    assert bench.extra_memory(candidates.reference_loss("tnkd")) > 3 * of.student_bytes


def test_forward_phase_builds_no_graph():
    bench = measure.Bench(case(phase=cases.FORWARD), torch.device("cpu"))
    assert not bench.call(candidates.reference_loss("tnkd")).requires_grad
    gradient = measure.Bench(case(), torch.device("cpu")).call(candidates.reference_loss("tnkd"))
    assert gradient[0].shape == (2, 3, 4, 4) and gradient[0].abs().sum() > 0


def test_upstream_gradient_reaches_the_loss():
    plain, scaled = (measure.Bench(case(), torch.device("cpu"), upstream) for upstream in (1.0, 0.5))
    loss = candidates.reference_loss("tnkd")
    torch.testing.assert_close(plain.call(loss)[0] * 0.5, scaled.call(loss)[0])


def test_row_ratios():
    of = case(shape="4x6x512x512")
    floor_ms = of.floor_bytes / 10.0 / 1e6
    entries = [("eager", 300.0, 10), ("mask-trick", 200.0, 9), ("compile", 50.0, 5), ("native", 10.0, 1)]
    (row,) = report.make_rows(result([measured(of, name, ms, n * of.student_bytes) for name, ms, n in entries]))
    assert row.ours_name == "native"
    assert (row.speedup("eager"), row.speedup("compile"), row.speedup_best) == pytest.approx((30, 5, 5))
    assert row.x_floor() == pytest.approx(10 / floor_ms)
    assert (row.memory(), row.memory("eager")) == pytest.approx((1, 10))
    small = result([measured(case(), "native", 1.0)])
    small["machine"]["cache_bytes"] = 32 << 20
    assert report.make_rows(small)[0].x_floor() is None  # in cache


TIMES = {"eager": 100.0, "compile": 30.0, "beforehand": 12.0, "cross-entropy": 11.0, "full-size": 1.0}


def full_result(ours_ms: float, extra: float = 1.0, device: str = "cpu"):
    """Every case in the table of thresholds, floor 1 ms, the baselines as in TIMES."""
    measurements = []
    losses = [loss for loss in cases.LOSSES if loss != "dsct"]
    for of in cases.make_cases(losses, device, phases=[cases.FORWARD_BACKWARD]):
        copy_gb_s = of.floor_bytes / 1e6
        for name, ms in {**TIMES, "native": ours_ms}.items():
            if of.loss not in cases.LOWRES and name in ("beforehand", "cross-entropy", "full-size"):
                continue
            measurements.append(measured(of, name, ms, int(extra * of.student_bytes), device, copy_gb_s))
    return result(measurements, device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_check_passes_and_misses(device):
    verdicts = check.check(full_result(1.0, device=device))
    assert verdicts and all(verdict.passed for verdict in verdicts)
    assert {v.threshold for v in verdicts} == {t for t in check.THRESHOLDS if t.device == device}
    slow = [v for v in check.check(full_result(31.0, device=device)) if not v.passed]
    on_cpu = {"x beforehand", "x cross-entropy", "of full size"} if device == "cpu" else set()
    assert {v.threshold.figure for v in slow} >= {"x eager", "x compile", "x best", *on_cpu}
    greedy = [v for v in check.check(full_result(1.0, extra=1.2, device=device)) if not v.passed]
    assert {v.threshold.figure for v in greedy} == {"extra memory in student tensors"}


@pytest.mark.parametrize(
    "loss,shape,beforehand,compiled,tensors",
    [
        *((loss, cases.LOWRES_SHAPES[0], 5, 15, 2) for loss in ("lowres", "lowres-tnkd")),
        *((loss, cases.LOWRES_SHAPES[-1], 10, 25, 2) for loss in ("lowres", "lowres-tnkd")),
        ("lowres-dsct", cases.LOWRES_SHAPES[0], 3, 12, 3.5),
        ("lowres-dsct", cases.LOWRES_SHAPES[-1], 6, 25, 3.5),
    ],
)
def test_what_is_required_where_logits_are_smaller_than_the_labels(loss, shape, beforehand, compiled, tensors):
    of = case(loss, shape)
    required = {"x beforehand": beforehand, "x compile": compiled, "x cross-entropy": 5, "of full size": 1.2,
                "extra memory in student tensors, less scratch": tensors}  # fmt: skip
    greedy = measured(of, "native", 1.0, int((tensors + 1) * of.student_bytes))
    found = {v.threshold.figure: v for v in check.check(result([greedy]))}
    assert {name: v.threshold.value for name, v in found.items()} == required
    assert not any(v.passed for v in found.values()), "no baseline was timed, and a tensor more is too many"
    entries = [measured(of, name, value) for name, value in (("native", 1.0), ("full-size", 1 / 1.25))]
    (late,) = (v for v in check.check(result(entries)) if v.threshold.figure == "of full size")
    assert late.value == pytest.approx(1.25) and not late.passed
    within = measured(of, "native", 1.0, int(tensors * of.student_bytes) + check.SCRATCH)
    (fits,) = (v for v in check.check(result([within])) if "scratch" in v.threshold.figure)
    assert fits.passed


def test_a_small_image_is_held_against_the_better_of_compile_and_the_old_path():
    of = case("lowres", cases.LOWRES_SMALL)
    for name in ("compile", "beforehand"):
        others = {"compile": 2.0, "beforehand": 2.0, name: 0.9}
        entries = [measured(of, each, ms) for each, ms in {**others, "native": 1.0}.items()]
        (verdict,) = check.check(result(entries))
        assert verdict.threshold.figure == "x best" and verdict.value == pytest.approx(0.9) and not verdict.passed


def test_check_calls_a_missing_figure_a_miss():
    verdicts = check.check(result([measured(case(shape="4x6x512x512"), "native", 1.0)]))  # no baselines timed
    assert any(v.value is None and not v.passed for v in verdicts)


def test_markdown_has_the_figures():
    first, second, note = report.markdown(full_result(2.0)).split("\n\n")
    left = "| loss | shape | layout | dtype "
    lines = first.splitlines()
    assert lines[0].startswith(f"{left}| compile ms | beforehand ms | cross-entropy ms | full-size ms | ours ms |")
    row = next(line for line in lines if "lowres-dsct | 1 x 6 x 16 x 16 @ 64 x 64 | contiguous | fp32" in line)
    cells = [cell.strip() for cell in row.split("|")[5:-1]]
    assert cells == ["30.0", "12.0", "11.0", "1.00", "2.00", "15.0", "6.00", "5.50", "0.50", "2.00", "1.00"]
    assert note.startswith("a machine, 2 threads, torch 2")
    lines = second.splitlines()
    assert lines[0].startswith(f"{left}| eager ms | mask-trick ms | compile ms | ours ms |")
    row = next(line for line in lines if "1 x 150 x 512 x 512 | contiguous | fp32" in line)
    cells = [cell.strip() for cell in row.split("|")[5:-1]]
    assert cells == ["100", "-", "30.0", "2.00", "50.0", "15.0", "2.00", "1.00"]


def test_markdown_of_a_gpu_has_a_line_for_each_backend_with_bandwidth_and_host_time():
    of = case(shape="16x19x512x512")
    times = {"eager": 100.0, "compile": 30.0, "triton": 4.0, "native": 2.0}
    entries = [measured(of, name, ms, of.student_bytes, "cuda", of.floor_bytes / 1e6) for name, ms in times.items()]
    entries[-1]["host_ms"] = 0.05
    header, _, native, triton, *_ = report.markdown(result(entries, "cuda")).splitlines()
    rows = [dict(zip(*([c.strip() for c in line.split("|")] for line in (header, row)))) for row in (native, triton)]
    assert [row["backend"] for row in rows] == ["native", "triton"], "what auto picks comes first"
    assert [row["ms"] for row in rows] == ["2.00", "4.00"] and [row["host ms"] for row in rows] == ["0.0500", "-"]
    assert [row["of copy"] for row in rows] == ["50%", "25%"] and [row["x eager"] for row in rows] == ["50.0", "25.0"]
    assert rows[0]["GB/s"] == report.number(of.floor_bytes / 2.0 / 1e6)


def test_chart_is_drawn_for_each_loss(tmp_path):
    pytest.importorskip("matplotlib")
    of_two = [m for m in full_result(2.0)["measurements"] if m["loss"] in ("cafd", "lowres-dsct")]
    paths = report.draw_charts(result(of_two[::-1]), tmp_path / "chart.png")
    assert [path.name for path in paths] == ["chart-lowres-dsct.png", "chart-cafd.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize("launches,calls", [(5, 32), (60, 16), (2000, 1)])
def test_a_sample_is_no_longer_than_the_launch_queue(launches, calls):
    """A model of a queue of 1024 launches, 10 us of host time each: what a real one does is not tested here."""

    def attempt(calls, hold):
        host = calls * launches * 1e-5
        whole = calls * launches <= 1024 and host < hold
        return measure.Queued(1e-5, max(host, hold if calls * launches > 1024 else 0.0) / calls, whole)

    got, hold = measure.fill_queue(attempt, 32)
    assert got == calls and hold <= measure.MAX_HOLD_S
    assert attempt(got, hold).whole == (hold > 0) == (launches <= 1024)


def test_a_candidate_that_breaks_off_leaves_the_others():
    bench = measure.Bench(case(), torch.device("cpu"))
    loss, left = candidates.reference_loss("tnkd"), [3]

    def breaks(x):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no room")
        return loss(x)

    timings = bench.time_interleaved({"eager": loss, "native": breaks}, 0.05)
    assert set(timings) == {"eager", "copy"} and set(bench.failed) == {"native"}


def test_a_case_that_fails_leaves_the_others(tmp_path, monkeypatch):
    pytest.importorskip("rich")

    def measure_case(of, *_):
        if of.loss == "tnkd":
            raise RuntimeError("no such luck")
        return [measured(of, "native", 1.0)]

    monkeypatch.setattr(bench_losses, "measure_case", measure_case)
    path = tmp_path / "out.json"
    assert bench_losses.main(["--quick", "--only-shape", "2x3x4x4", "--one-process", "--json", str(path)]) == 1
    data = json.loads(path.read_text())
    assert {m["loss"] for m in data["measurements"]} == set(cases.LOSSES) - {"tnkd"}
    assert [failure["reason"] for failure in data["failed"]] == ["no such luck"]


def test_no_case_inherits_the_process_of_another():
    threads = torch.get_num_threads()
    arguments = ["--quick", "--budget", "0.01", "--baselines", "eager", "--threads", str(threads + 1)]
    options = bench_losses.parse(arguments)
    entries = bench_losses.measure_alone(case("tnkd", "2x3x4x4"), torch.device("cpu"), options)
    assert {entry["candidate"] for entry in entries} == {"eager", "native"}
    assert torch.get_num_threads() == threads  # another process's were set
    with pytest.raises(ValueError, match="NxCxHxW"):
        bench_losses.measure_alone(case("tnkd", "2x3"), torch.device("cpu"), options)


def test_append_refuses_another_device(tmp_path):
    path = tmp_path / "out.json"
    path.write_text(json.dumps(result([], device="cuda")))
    options = bench_losses.parse(["--quick", "--json", str(path), "--append"])
    with pytest.raises(SystemExit, match="device cuda"):
        bench_losses.run(options, print)


def test_small_shapes_are_judged_as_called():
    of = case(shape="128x100x1x1")
    entries = [measured(of, name, ms, device="cuda") for name, ms in (("eager", 0.2), ("native", 0.01))]
    for entry, host_ms in zip(entries, (0.3, 0.1)):
        entry["host_ms"] = host_ms
    (row,) = report.make_rows(result(entries, "cuda"))
    assert row.speedup("eager") == pytest.approx(20) and row.speedup_best == pytest.approx(3)


@pytest.mark.parametrize(
    "loss,shape", [("cafd", "2x3x8x8"), ("dsct", "2x3x8x8+2x3x4x4"), *((x, "2x3x8x8@16x16") for x in cases.LOWRES)]
)
def test_the_compiled_baseline_is_compiled_once_for_all_buffers(loss, shape):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(candidates.reference_loss(loss), backend=count)
    for seed in range(3):
        compiled(cases.make_inputs(case(loss, shape), torch.device("cpu"), seed))
        if seed == 0:
            first = len(graphs)
    assert len(graphs) == first > 0


def test_a_tiny_run_from_end_to_end(tmp_path, capsys):
    pytest.importorskip("rich")
    path = tmp_path / "out.json"
    options = ["--quick", "--only-shape", "2x3x4x4", "2x3x4x4@8x8", "--budget", "0.01", "--threads", "1"]
    options += ["--loss", "lowres-dsct", "tnkd", "cafd", "--baselines", "eager", "mask-trick", "full-size"]
    command = [sys.executable, ROOT / "benchmarks" / "bench_losses.py", *options, "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)  # as users run it
    assert done.returncode == 0, done.stderr
    data = json.loads(path.read_text())
    assert {(m["loss"], m["candidate"]) for m in data["measurements"] if "ms" in m} >= {
        ("tnkd", "eager"), ("tnkd", "mask-trick"), ("cafd", "eager"), ("lowres-dsct", "full-size"),
    }  # fmt: skip
    for m in data["measurements"]:
        assert "reason" in m or (0 < m["ms"]["min"] <= m["ms"]["median"] <= m["ms"]["max"] < math.inf)
        assert m["copy_gb_s"] > 0
    assert "torch" in data["machine"] and "build" in data["machine"]
    assert data["settings"]["processes"] == "one for each case" and list(tmp_path.iterdir()) == [path]

    bench_losses.main([*options, "--loss", "tnkd", "--dtype", "bf16", "--json", str(path), "--append"])
    assert len(json.loads(path.read_text())["measurements"]) > len(data["measurements"])
    assert "--json PATH" not in done.stderr + capsys.readouterr().err
    bench_losses.main(["--quick", "--only-shape", "2x3x4x4", "--loss", "cafd", "--budget", "0.01", "--one-process"])
    assert "nothing is kept of this run: --json PATH" in capsys.readouterr().err
    assert bench_losses.main(["--read", str(path), "--markdown"]) == 0
    assert "| tnkd | 2 x 3 x 4 x 4 | contiguous | bf16 |" in capsys.readouterr().out
    assert bench_losses.main(["--read", str(path), "--markdown", "--dtype", "fp32", "--loss", "tnkd", "cafd"]) == 0
    fp32 = capsys.readouterr().out
    assert "| cafd | 2 x 3 x 4 x 4 | contiguous | fp32 |" in fp32 and "bf16" not in fp32 and "lowres" not in fp32
    with pytest.raises(SystemExit, match="none of the cases"):
        bench_losses.main(["--read", str(path), "--layout", "channels_last"])
    assert bench_losses.main(["--read", str(path), "--check"]) == 1  # no required shape was run: not a pass
    assert "0 of 0" in capsys.readouterr().out


def test_a_training_step_both_ways(tmp_path, capsys):
    pytest.importorskip("transformers")
    path = tmp_path / "step.json"
    options = ["--student", "segformer-tiny", "--teacher", "segformer-tiny", "--crop", "64", "--classes", "5"]
    assert train_step.main([*options, "--steps", "1", "--batch", "2", "--json", str(path), "--markdown"]) == 0
    measurements = json.loads(path.read_text())["measurements"]
    assert [m["objective"] for m in measurements] == ["lowres", "lowres-dsct"]
    for m in measurements:
        assert m["models_bytes"] > 0 and m["classes"] == 5
        for way in m["ways"].values():
            assert 0 < way["loss_ms"] < way["step_ms"] < math.inf and way["extra_bytes"] >= 0
            assert way["loss_share"] == pytest.approx(way["loss_ms"] / way["step_ms"])
            assert way["images_per_s"] == pytest.approx(2e3 / way["step_ms"])
    out = capsys.readouterr().out
    assert "| dsct_loss as it is | 5 | 2 |" in out and "segformer-tiny learning from segformer-tiny" in out


@pytest.mark.parametrize("objective", train_step.OBJECTIVES)
def test_both_ways_train_the_student_alike(objective):
    pytest.importorskip("transformers")
    options = ["--student", "segformer-tiny", "--teacher", "segformer-tiny", "--crop", "64"]
    step = train_step.Step(train_step.parse(options), 5)
    step.student.eval()  # no dropout between the two
    gradients = []
    for loss in (candidates.reference_loss(objective), candidates.backend_loss(objective, "auto")):
        step.run(loss)
        gradients.append(torch.cat([p.grad.flatten() for p in step.student.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[0].norm() > 0


@pytest.mark.parametrize("loss", ["tnkd", "cafd"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_tuning_runs_what_the_table_chose_and_others(loss, layout, monkeypatch, capsys):
    """Under the interpreter, untimed: of many candidates the first two."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    from benchmarks import tune_triton
    from dsct_kernels.triton_common import interpreted

    if not interpreted():
        pytest.skip("runs Triton's kernels on the CPU")
    launched = []

    def once(run, sets):
        assert sets >= 2
        if len(launched) < 2:
            launched.append(run(1))
        return float(len(launched))

    monkeypatch.setattr(tune_triton, "milliseconds", once)
    monkeypatch.setattr(tune_triton, "cache_bytes", lambda device: 1)
    tune_triton.tune(loss, (2, 4, 4, 8), torch.float32, layout, 1000.0, 3, True, "cpu")
    out = capsys.readouterr().out
    assert "1000.0 us" in out and out.count("<- table") == 1 and len(launched) == 2
