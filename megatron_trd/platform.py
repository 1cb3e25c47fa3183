"""The one seam between CUDA and CPU: the only module that knows which it runs on.

On a GPU node: NCCL, transformer-engine layers, bf16. On a bare CPU node: gloo, megatron-core's local layers, fp32, and
the few places where megatron-core takes a GPU for granted are redirected to the CPU while Megatron code runs
(`Platform.megatron()`). Everything else in the project asks `current()` and does not branch; `losses`, which imports
only torch, checks its tensors' device for block sizes and for the mixed-precision products that only CUDA has.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_trd import host_memory, megatron_on_cpu, vllm_on_cpu, vllm_on_cuda
from megatron_trd.config import SamplerConfig

# Timeout of collectives: ranks wait while one writes a checkpoint to a slow disk or samples the longest response.
PATIENCE = timedelta(hours=1)


def optimizer_parts(optimizer: Any) -> list[Any]:
    """The optimizers that a Megatron optimizer is made of: itself, or the links of a chain."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


class Platform(ABC):
    """What differs between a GPU node and a CPU node."""

    backend: str
    dtype: torch.dtype
    device: torch.device
    extra: str  # optional dependencies of pyproject.toml that it needs
    found: str  # for the user: how a process comes to be on it, and what to do if it should not be
    least_bandwidth: float  # GB/s of an all-reduce, below which communication would dominate a step
    # Sequence lengths of micro-batches are multiples of this: each length has its own kernels and plans.
    length_multiple: int
    threads_communicate: bool  # whether two threads of a rank may be in collectives of different groups at once

    @abstractmethod
    def set_up(self) -> None:
        """Prepare this process (device, patches) before any process group or model is made."""

    def join(self) -> None:
        """Make the default process group of this rank's job, as torchrun's environment describes it."""
        dist.init_process_group(self.backend, timeout=PATIENCE)

    @abstractmethod
    def prepare_thread(self) -> None:
        """Prepare another thread of this process for computation."""

    @abstractmethod
    def megatron(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which megatron-core code runs; may be nested."""

    @abstractmethod
    def layer_spec(self, config: Any) -> Any:
        """megatron-core layer specification for a `TransformerConfig`."""

    @abstractmethod
    def transformer_config(self) -> dict[str, Any]:
        """Fields of `TransformerConfig` that name kernels and dtypes."""

    def sum_gradients_in_fp32(self, model: torch.nn.Module) -> None:
        """Have the layers of a model under Megatron's DDP add weight gradients to `main_grad` unrounded."""

    @abstractmethod
    def optimizer_config(self) -> dict[str, Any]:
        """Fields of `OptimizerConfig` that name dtypes."""

    def sampler_environment(self) -> dict[str, str]:
        """Environment variables vLLM reads at import and at start."""
        return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

    @abstractmethod
    def sampler_arguments(self, config: SamplerConfig, max_length: int, *, sleeps: bool, alone: bool) -> dict[str, Any]:
        """Arguments of `vllm.LLM`, which is created within `starting_sampler`: memory, sleep, graph capture, kernels,
        and batching of sequences of `max_length` tokens. `alone`: whether it is the only engine of its process."""

    def starting_sampler(self, job: str) -> contextlib.AbstractContextManager[Any]:
        """Context in which a vLLM engine is made; `job` names this job among others on the machine."""
        return contextlib.nullcontext()

    def engine_context(self) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        """For one vLLM engine: creates the context in which it is started, and each in which it works."""
        return contextlib.nullcontext

    def prepare_restart(self) -> None:
        """Runs before an engine is shut down to be recreated."""

    def prepare_reload(self, model: torch.nn.Module) -> None:
        """Runs in a vLLM worker before weights are reloaded into its model."""

    def finish_reload(self, model: torch.nn.Module) -> None:
        """Runs in a vLLM worker after its model has received new weights."""

    def expert_weights(self, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """vLLM's experts of a layer -> (gate above up `[experts, 2 * ffn, hidden]`, down `[experts, hidden, ffn]`)."""
        return module.w13_weight.data, module.w2_weight.data

    def peers(self, named: Mapping[str, torch.Tensor], group: Any) -> host_memory.Peers | None:
        """Tensors of this rank and of the other ranks of `group`, where each rank can read them; None: it cannot.

        Collective in `group`.
        """
        return None

    def peak_memory_gib(self) -> dict[str, float]:
        """Kind of memory -> this process's peak use since the last call, GiB."""
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        with contextlib.suppress(OSError):  # if it is forbidden, peaks cover the process's whole life
            Path("/proc/self/clear_refs").write_text("5")  # linux/Documentation/filesystems/proc.rst: reset VmHWM
        return {"host": int(peak[1]) / 2**20 if peak else 0.0}

    def complete_optimizer(self, optimizer: Any) -> None:
        """Give a Megatron optimizer the state that its first step would create: a checkpoint holds all of it."""
        for part in optimizer_parts(optimizer):
            part.init_state_fn(part.optimizer, part.config)

    def can_move(self, storage: torch.UntypedStorage) -> bool:
        """Whether nothing else depends on where a storage is."""
        return bool(storage.resizable())

    def host_bytes(self, size: int) -> torch.Tensor:
        """`[size]` uint8 of host memory that the device can read and write directly."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in such memory, made after the work queued so far."""
        host = self.host_bytes(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return host.copy_(tensor, non_blocking=True)

    def release_memory(self) -> None:
        """Return memory cached by torch to the device, for others to use."""

    def synchronize(self) -> None:
        """Wait for queued device work, so that a clock read after it measures that work."""

    @abstractmethod
    def libraries(self) -> dict[str, str]:
        """Versions of the libraries below torch, by name; for display."""

    def gpu_count(self) -> int:
        """GPUs that this process may use; 0: ranks run on the host's processors."""
        return 0

    def ranks(self, fewest: int) -> int:
        """Default number of ranks of a job on this machine: a multiple of `fewest`, as many as there are GPUs for."""
        return max(fewest, self.gpu_count() // fewest * fewest)

    def gpu(self, index: int) -> tuple[str, float, float]:
        """Name of a GPU, GiB in use by any process, and total GiB."""
        raise IndexError(index)

    def unused_gpu(self) -> str | None:
        """Why torch cannot use a GPU that this machine has and that is not hidden, if there is one."""
        return None


class CudaPlatform(Platform):
    """NVIDIA GPUs: one rank per GPU, chosen by LOCAL_RANK."""

    backend = "nccl"
    dtype = torch.bfloat16
    extra = "gpu"
    found = "torch sees a GPU: CUDA_VISIBLE_DEVICES= (empty) runs on the CPU; for the GPU,"
    # The gradients of 8 billion parameters, 33 GB, cross the network every step: 7 s at this rate.
    least_bandwidth = 5.0
    length_multiple = 256  # transformer-engine keeps its attention plans forever
    # Ranks whose threads launch NCCL kernels in different orders may wait for each other.
    threads_communicate = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def set_up(self) -> None:
        torch.cuda.set_device(self.device)

    def prepare_thread(self) -> None:
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(torch.cuda.Stream())  # a thread's work does not wait for other threads'

    def megatron(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def layer_spec(self, config: Any) -> Any:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=True, qk_layernorm=config.qk_layernorm
        )

    def transformer_config(self) -> dict[str, Any]:
        return {
            "params_dtype": self.dtype,
            "pipeline_dtype": self.dtype,
            "bf16": True,
            # off by default in megatron-core, on in everything that trains with it
            "bias_activation_fusion": True,
            "bias_dropout_fusion": True,
            "apply_rope_fusion": True,
        }

    def sum_gradients_in_fp32(self, model: torch.nn.Module) -> None:
        # transformer-engine's products do it themselves. megatron-core's setting for it would also require Apex, whose
        # kernel is used only by the output layer, which is not called here.
        layers: list[Any] = [module for module in model.modules() if hasattr(module, "fuse_wgrad_accumulation")]
        for layer in layers:
            layer.fuse_wgrad_accumulation = True

    def optimizer_config(self) -> dict[str, Any]:
        return {"params_dtype": self.dtype, "bf16": True}

    def sampler_environment(self) -> dict[str, str]:
        return super().sampler_environment() | {
            # It does not support requests with their own seed, as all have here, and is compiled at engine start.
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
        }

    def sampler_arguments(self, config: SamplerConfig, max_length: int, *, sleeps: bool, alone: bool) -> dict[str, Any]:
        return {
            "gpu_memory_utilization": config.memory_fraction,
            "enforce_eager": config.enforce_eager,
            "enable_sleep_mode": sleeps,
            # The same logits as the trainer's: rounded to bf16, they would be those of a different policy than it
            # learns from.
            "hf_overrides": {"head_dtype": "float32"},
            "kernel_config": {
                # Others keep experts in their own order, which a refit check cannot read.
                "moe_backend": "triton",
                # It compiles everything that vLLM can do to logits, most of which is not used here, and monitors the
                # trainer's own kernels from then on.
                "enable_jit_warmup": False,
            },
            # Its scratch memory is shared by the process, with the size that the first engine requests (vLLM 0.32).
            **({} if alone or config.tp == 1 else {"compilation_config": _NO_FUSED_ALL_REDUCE}),
        }

    def starting_sampler(self, job: str) -> contextlib.AbstractContextManager[Any]:
        return vllm_on_cuda.keeping_threads()

    def engine_context(self) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        return vllm_on_cuda.EngineContext(self.device)

    def prepare_restart(self) -> None:
        vllm_on_cuda.keep_allocators()

    def peak_memory_gib(self) -> dict[str, float]:
        # torch counts the memory of a sleeping engine as still allocated.
        peak = (torch.cuda.max_memory_allocated() - vllm_on_cuda.asleep_bytes()) / 2**30
        torch.cuda.reset_peak_memory_stats()
        return super().peak_memory_gib() | {"device": peak}

    def release_memory(self) -> None:
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def libraries(self) -> dict[str, str]:
        driver = re.search(r"\d+\.\d[\d.]*", _DRIVER.read_text()) if _DRIVER.exists() else None
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return {"CUDA": str(torch.version.cuda), "NCCL": nccl, "driver": driver[0] if driver else "unknown"}

    def gpu_count(self) -> int:
        return torch.cuda.device_count()

    def gpu(self, index: int) -> tuple[str, float, float]:
        free, total = torch.cuda.mem_get_info(index)
        return torch.cuda.get_device_name(index), (total - free) / 2**30, total / 2**30


_NO_FUSED_ALL_REDUCE = {"pass_config": {"fuse_allreduce_rms": False}}

_set_num_threads = torch.set_num_threads  # a vLLM worker replaces it with a no-op
_BATCHED_TOKENS = 4096  # of prompts in one pass of a sampler on a CPU: vLLM's own default there


class CpuPlatform(Platform):
    """Host processors: ranks share the machine, gloo carries the collectives, fp32 throughout."""

    backend = "gloo"
    dtype = torch.float32
    device = torch.device("cpu")
    extra = "cpu"
    found = "torch sees no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES; for a CPU,"
    # Models trained on a CPU have 100 million parameters: 0.4 GB of gradients, 4 s at this rate.
    least_bandwidth = 0.1
    length_multiple = 1
    threads_communicate = True

    def __init__(self) -> None:
        self._depth = 0
        self._threads = 1

    def set_up(self) -> None:
        # Each rank gets a share of the cores: otherwise every rank starts a thread for each core and they compete.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        torch.set_num_threads(self._threads)
        host_memory.keep_freed()
        megatron_on_cpu.share_gloo_device()
        megatron_on_cpu.patch_optimizers()

    def prepare_thread(self) -> None:
        _set_num_threads(self._threads)  # OpenMP's thread count is set per calling thread

    @contextlib.contextmanager
    def megatron(self) -> Iterator[None]:
        if self._depth:
            yield
            return
        self._depth += 1
        try:
            with megatron_on_cpu.patches():
                yield
        finally:
            self._depth -= 1

    def layer_spec(self, config: Any) -> Any:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
        if config.num_moe_experts:  # a separate norm in checkpoints, as in transformer-engine's layer
            spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
        return spec

    def transformer_config(self) -> dict[str, Any]:
        return {
            "params_dtype": self.dtype,
            "pipeline_dtype": self.dtype,
            "use_cpu_initialization": True,
            # CUDA-only fused kernels
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
            "persist_layer_norm": False,
            "gradient_accumulation_fusion": False,
        }

    def optimizer_config(self) -> dict[str, Any]:
        return {"params_dtype": self.dtype}

    def sampler_environment(self) -> dict[str, str]:
        return super().sampler_environment() | {
            # Several engines share the host's memory and cores: no binding of OpenMP threads to cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Otherwise the few lines that rank a sampled token are compiled to C++, in every process, which takes
            # longer than a short job's sampling and needs a compiler.
            "TORCHDYNAMO_DISABLE": "1",
        }

    def sampler_arguments(self, config: SamplerConfig, max_length: int, *, sleeps: bool, alone: bool) -> dict[str, Any]:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.host_kv_cache_gib)  # GiB, read when the engine starts
        return {
            "enforce_eager": True,  # graph capture compiles for minutes on a CPU
            # A prompt cut into chunks samples one token too many, and vLLM then rewinds the request's own generator,
            # which CPU generators do not support (seen with vLLM 0.32). Whole prompts only.
            "enable_chunked_prefill": False,
            "ir_op_priority": vllm_on_cpu.NORMS,
            "max_num_batched_tokens": max(_BATCHED_TOKENS, max_length),
        }

    def starting_sampler(self, job: str) -> contextlib.AbstractContextManager[Any]:
        return vllm_on_cpu.starting(f"{job}-{socket.gethostname()}")

    def prepare_reload(self, model: torch.nn.Module) -> None:
        vllm_on_cpu.drop_expert_kernels(model)

    def finish_reload(self, model: torch.nn.Module) -> None:
        vllm_on_cpu.pack_when_used(model)

    def expert_weights(self, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return vllm_on_cpu.expert_weights(module)

    def release_memory(self) -> None:
        host_memory.give_back()

    def can_move(self, storage: torch.UntypedStorage) -> bool:
        # Shared storages are read by other ranks or by a checkpoint's writer.
        return super().can_move(storage) and not storage.is_shared()

    def peers(self, named: Mapping[str, torch.Tensor], group: Any) -> host_memory.Peers | None:
        return host_memory.show(named, group) if group.size() > 1 else None

    def peak_memory_gib(self) -> dict[str, float]:
        return {"host": super().peak_memory_gib()["host"] - host_memory.Peers.foreign_bytes() / 2**30}

    def complete_optimizer(self, optimizer: Any) -> None:
        super().complete_optimizer(optimizer)
        for part in optimizer_parts(optimizer):  # torch's Adam counts steps per parameter
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))

    def libraries(self) -> dict[str, str]:
        return {"CUDA, NCCL, driver": "not needed on a CPU"}

    def unused_gpu(self) -> str | None:
        if not _DRIVER.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return None
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
            return f"torch cannot use this machine's GPU: {str(error).splitlines()[0]}"
        return "torch finds no GPU that this process may use"


_DRIVER = Path("/proc/driver/nvidia/version")  # exists if NVIDIA's kernel module is loaded


@functools.cache
def current() -> Platform:
    """The platform of this process."""
    return CudaPlatform() if torch.cuda.is_available() else CpuPlatform()
