"""Unsloth on a machine without a GPU, for tests: on the path of a process, it lends Unsloth a CPU to take for a device.

Unsloth starts without a GPU under `UNSLOTH_ALLOW_CPU=1`, but asks CUDA what the device can do when it loads a model,
keeps its rotary tables per GPU, and leaves TRL's trainers alone. With `TRITON_INTERPRET=1` its own kernels run on the
CPU. So what is tested is Unsloth's code, its generated trainers, and its kernels, only slowly.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types


class _ThenPatched(importlib.abc.MetaPathFinder):
    """Finds `unsloth` as ever, and mends it once it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "unsloth":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)  # whether it is there may be asked first
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            _before()
            execute(module)
            _after()

        spec.loader.exec_module = exec_module
        return spec


def _before() -> None:
    import torch

    about = types.SimpleNamespace(name="CPU", total_memory=8 << 30, major=8, minor=0)
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.get_device_properties = lambda *_: about
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None


def _after() -> None:
    import torch
    from unsloth.models import llama, rl

    os.environ["UNSLOTH_ALLOW_CPU"] = "0"  # which skips what start-up does with a GPU there
    try:
        rl.patch_trl_disable_gradient_checkpointing()
        rl.patch_trl_rl_trainers()
        from unsloth.context_parallel import patch_sft_trainer
        from unsloth.trainer import _patch_trl_trainer

        _patch_trl_trainer()
        patch_sft_trainer()
    finally:
        os.environ["UNSLOTH_ALLOW_CPU"] = "1"

    def build(self, index):
        size = self.current_rope_size
        self._set_cos_sin_cache(
            seq_len=self._rope_cache_rows(), device=torch.device("cpu", 0), dtype=self._rope_cache_dtype
        )
        self.current_rope_size = size
        self._rope_cache_versions[0] = self._rope_cache_version

    def ensure(self, index):
        if self._rope_cache_stale(self.multi_gpu_cos_cached[0], 0):
            self._build_rope_cache(0)
            self._rope_rows_ready[0] = self.multi_gpu_cos_cached[0].shape[0]
        return 0

    llama.DEVICE_COUNT = 1
    llama._PerDeviceRopeCache._build_rope_cache = build
    llama._PerDeviceRopeCache._ensure_rope_cache = ensure


if os.environ.get("UNSLOTH_ALLOW_CPU") == "1":
    sys.meta_path.insert(0, _ThenPatched())
