"""Fair timing of several implementations of one operation, and the state of the GPU while it happens.

Implementations are interleaved: every round times each of them once, in rotating order, so that all see the
same clocks and temperature. One measurement is a batch of back-to-back calls between two CUDA events, long
enough that the events cost nothing. With method "graph" the batch is captured once in a CUDA graph and
replayed, so that the time the CPU takes to launch short kernels is not counted; with "events" the calls are
launched one by one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import torch

MAX_CALLS = 500
MIN_ROUNDS = 3


class GpuMonitor:
    """SM clock (MHz), power (W) and temperature (C) through NVML; without NVML every sample is empty."""

    def __init__(self, device: int = 0) -> None:
        self.nvml = None
        self.problem = ""
        try:
            import pynvml

            pynvml.nvmlInit()
            self.handle = self._find(pynvml, device)
            self.nvml = pynvml
        except Exception as error:  # no driver, no NVML bindings, or a GPU that NVML does not list
            self.problem = f"{type(error).__name__}: {error}"

    @staticmethod
    def _find(nvml, device: int):
        # CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's; the UUID is the same in both.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        try:
            return nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError:
            return nvml.nvmlDeviceGetHandleByIndex(device)

    def _power(self) -> float:
        nvml = self.nvml
        # NOTE: nvmlDeviceGetPowerUsage is a one-second average on Hopper, much longer than a measurement.
        with suppress(Exception):
            value = nvml.nvmlDeviceGetFieldValues(self.handle, [nvml.NVML_FI_DEV_POWER_INSTANT])[0]
            if value.nvmlReturn == nvml.NVML_SUCCESS:
                return value.value.uiVal / 1000
        return nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000

    def sample(self) -> dict[str, float]:
        """One reading: {"sm_clock_mhz", "power_w", "temperature_c"}, or {} if NVML does not answer."""
        if self.nvml is None:
            return {}
        nvml = self.nvml
        try:
            return {
                "sm_clock_mhz": float(nvml.nvmlDeviceGetClockInfo(self.handle, nvml.NVML_CLOCK_SM)),
                "power_w": self._power(),
                "temperature_c": float(nvml.nvmlDeviceGetTemperature(self.handle, nvml.NVML_TEMPERATURE_GPU)),
            }
        except nvml.NVMLError as error:
            self.problem, self.nvml = str(error), None
            return {}

    def facts(self) -> dict[str, object]:
        """Driver version, power limit (W) and highest SM clock (MHz), as far as NVML tells them."""
        if self.nvml is None:
            return {"nvml": self.problem}
        nvml = self.nvml
        queries: dict[str, Callable[[], object]] = {
            "driver": nvml.nvmlSystemGetDriverVersion,
            "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(self.handle) / 1000,
            "max_sm_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(self.handle, nvml.NVML_CLOCK_SM),
            "max_memory_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(self.handle, nvml.NVML_CLOCK_MEM),
        }
        found = {}
        for name, query in queries.items():
            with suppress(nvml.NVMLError):  # a virtual machine may refuse some of them
                found[name] = query()
        return {key: value.decode() if isinstance(value, bytes) else value for key, value in found.items()}


def device_facts(monitor: GpuMonitor | None = None, device: int = 0) -> dict[str, object]:
    """What the numbers were measured on: GPU, driver, CUDA, torch, multiprocessors, L2, memory, limits."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda_runtime": torch.version.cuda,
        **(monitor or GpuMonitor(device)).facts(),
    }


@dataclass
class Samples:
    """All measurements of one implementation on one problem."""

    method: str
    milliseconds: list[float] = field(default_factory=list)  # per call, one entry a round
    readings: list[dict[str, float]] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median over the rounds."""
        return (max(self.milliseconds) - min(self.milliseconds)) / self.median_ms

    def as_row(self) -> dict[str, object]:
        """Columns of a result row: time, spread, method, mean clock, power and temperature while timed."""
        row: dict[str, object] = {
            "ms": self.median_ms,
            "spread": self.spread,
            "rounds": len(self.milliseconds),
            "method": self.method,
        }
        for name in ("sm_clock_mhz", "power_w", "temperature_c"):
            values = [reading[name] for reading in self.readings if name in reading]
            row[name] = round(statistics.fmean(values), 1) if values else None
        return row


class Runner:
    """One implementation on one problem, warmed up and ready to be timed in batches of `calls` calls.

    Args:
        call: runs the operation once on the current stream; its return value is dropped.
        target_ms: how long one batch should take, in milliseconds.
        method: "graph" or "events". If capture fails, the runner uses events and `note` says why.
    """

    def __init__(self, call: Callable[[], object], target_ms: float = 15.0, method: str = "graph") -> None:
        self.call = call
        self.method = method
        self.note = ""
        self.graph: torch.cuda.CUDAGraph | None = None
        call()  # compiles, loads modules, creates handles
        torch.cuda.synchronize()
        one = self._elapsed(self._loop, 3) / 3
        self.calls = max(1, min(MAX_CALLS, round(target_ms / max(one, 1e-4))))
        if method == "graph":
            self._capture()
        self._elapsed(self._batch, self.calls)

    def _loop(self, calls: int) -> None:
        for _ in range(calls):
            self.call()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._loop(self.calls)
        except Exception as error:  # a peer that synchronises or uses another stream
            torch.cuda.synchronize()
            self.method = "events"
            self.note = f"graph capture failed ({str(error).splitlines()[0][:120]}), timed by events"
            return
        self.graph = graph

    def _batch(self, calls: int) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self._loop(calls)

    @staticmethod
    def _elapsed(
        work: Callable[[int], None],
        calls: int,
        monitor: GpuMonitor | None = None,
        readings: list | None = None,
    ) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work(calls)
        end.record()
        if monitor is not None and readings is not None:
            # Sampled by the launching thread, once it has nothing left to launch: no thread competes with it.
            time.sleep(1e-3)
            while not end.query():
                reading = monitor.sample()
                if not end.query() and reading:  # a reading that ended after the work would show an idle GPU
                    readings.append(reading)
                time.sleep(1e-3)
        end.synchronize()
        return start.elapsed_time(end)

    def measure(self, samples: Samples, monitor: GpuMonitor | None = None) -> None:
        """Time one batch and append it to `samples`."""
        total = self._elapsed(self._batch, self.calls, monitor, samples.readings)
        samples.milliseconds.append(total / self.calls)


def interleave(
    runners: Mapping[str, Runner],
    rounds: int,
    monitor: GpuMonitor | None = None,
    deadline: float | None = None,
) -> dict[str, Samples]:
    """Time every runner once a round, in rotating order.

    Args:
        runners: by name.
        rounds: rounds to run.
        monitor: read while each batch runs.
        deadline: value of time.monotonic() after which no round beyond MIN_ROUNDS is started.
    Returns:
        The samples of each runner, by name.
    """
    names = list(runners)
    samples = {name: Samples(runners[name].method) for name in names}
    for index in range(rounds if names else 0):
        if deadline is not None and index >= MIN_ROUNDS and time.monotonic() > deadline:
            break
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            runners[name].measure(samples[name], monitor)
    return samples


def matmul_runner(size: int = 8192, dtype: torch.dtype = torch.bfloat16, target_ms: float = 15.0) -> Runner:
    """A square matrix product through torch, the practical ceiling of the tensor cores."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Runner(lambda: torch.mm(a, b, out=out), target_ms, method="events")


def matmul_tflops(milliseconds: float, size: int = 8192) -> float:
    """Rate in TFLOP/s of a size^3 matrix product that took `milliseconds`."""
    return 2.0 * size**3 / (milliseconds * 1e9)


def matmul_ceiling(
    monitor: GpuMonitor | None = None, rounds: int = 5, target_ms: float = 60.0
) -> dict[str, object]:
    """bf16 8192 matmul rate of the GPU as it is now, with clock and power."""
    samples = interleave({"matmul": matmul_runner(target_ms=target_ms)}, rounds, monitor)["matmul"]
    return {"tflops": matmul_tflops(samples.median_ms), **samples.as_row()}
