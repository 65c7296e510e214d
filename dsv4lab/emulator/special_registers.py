"""The special registers of PTX (%tid, %ctaid, %laneid, ...) for all warps of a wave."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.machine import Machine

_AXES = "xyz"
Register = np.ndarray | Callable[["Batch"], np.ndarray]


def special_registers(machine: Machine) -> dict[str, Register]:
    """Each register by name: an array (warps, 32), (warps, 1) or (1, 1), or a function of a batch."""
    return _of_lanes(machine) | _of_ctas(machine) | _of_launch(machine) | _clocks(machine)


def _u32(values: np.ndarray | int) -> np.ndarray:
    return np.atleast_2d(np.asarray(values)).astype(np.uint32)


def _of_lanes(machine: Machine) -> dict[str, Register]:
    x, y, _ = machine.launch.block
    thread = np.arange(machine.warps_per_cta * 32).reshape(-1, 32)
    each = {"x": thread % x, "y": thread // x % y, "z": thread // (x * y)}
    registers = {f"%tid.{axis}": _u32(np.tile(each[axis], (machine.ctas, 1))) for axis in _AXES}
    lane = np.arange(32)[None]
    registers["%laneid"] = _u32(lane)
    bit = 1 << lane
    registers |= {
        "%lanemask_eq": _u32(bit),
        "%lanemask_lt": _u32(bit - 1),
        "%lanemask_le": _u32(2 * bit - 1),
        "%lanemask_gt": _u32(0xFFFFFFFF ^ (2 * bit - 1)),
        "%lanemask_ge": _u32(0xFFFFFFFF ^ (bit - 1)),
    }
    warp = np.tile(np.arange(machine.warps_per_cta), machine.ctas)[:, None]
    return registers | {"%warpid": _u32(warp), "%nwarpid": _u32(64)}


def _of_ctas(machine: Machine) -> dict[str, Register]:
    def of_warps(values: np.ndarray) -> np.ndarray:
        return _u32(np.repeat(values, machine.warps_per_cta)[:, None])

    index, cluster = machine.cta_index, np.array(machine.launch.cluster)
    registers = {f"%ctaid.{axis}": of_warps(index[:, i]) for i, axis in enumerate(_AXES)}
    registers |= {f"%clusterid.{axis}": of_warps(index[:, i] // cluster[i]) for i, axis in enumerate(_AXES)}
    registers |= {
        f"%cluster_ctaid.{axis}": of_warps(index[:, i] % cluster[i]) for i, axis in enumerate(_AXES)
    }
    registers["%cluster_ctarank"] = of_warps(np.arange(machine.ctas) % machine.cluster_size)
    registers["%smid"] = of_warps(np.arange(machine.ctas) % machine.arch.sm_count)
    return registers


def _of_launch(machine: Machine) -> dict[str, Register]:
    launch = machine.launch
    grid, block, cluster = launch.grid, launch.block, launch.cluster
    registers = {}
    for i, axis in enumerate(_AXES):
        registers[f"%nctaid.{axis}"] = _u32(grid[i])
        registers[f"%ntid.{axis}"] = _u32(block[i])
        registers[f"%nclusterid.{axis}"] = _u32(grid[i] // cluster[i])
        registers[f"%cluster_nctaid.{axis}"] = _u32(cluster[i])
    explicit = "cluster_dimension" in dict(launch.attributes)
    return registers | {
        "%cluster_nctarank": _u32(machine.cluster_size),
        "%is_explicit_cluster": np.array([[explicit]]),
        "%nsmid": _u32(machine.arch.sm_count),
        "%gridid": np.array([[machine.run.number]], np.uint64),
        "%dynamic_smem_size": _u32(launch.shared_bytes),
        "%total_smem_size": _u32(machine.shared.size),
        "%aggr_smem_size": _u32(machine.shared.size),
        "%reserved_smem_offset_begin": _u32(0),
        "%reserved_smem_offset_end": _u32(1024),
        "%reserved_smem_offset_cap": _u32(1024),
    }


def _clocks(machine: Machine) -> dict[str, Register]:
    """The model's time; a global timer that counts its cycles as nanoseconds."""

    def clock(batch: Batch) -> np.ndarray:
        return machine.time[batch.index].astype(np.uint64)[:, None]

    def low(batch: Batch) -> np.ndarray:
        return clock(batch).astype(np.uint32)

    def high(batch: Batch) -> np.ndarray:
        return (clock(batch) >> np.uint64(32)).astype(np.uint32)

    return {
        "%clock": low,
        "%clock_hi": high,
        "%clock64": clock,
        "%globaltimer": clock,
        "%globaltimer_lo": low,
        "%globaltimer_hi": high,
    }
