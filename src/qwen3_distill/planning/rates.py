"""Holds the rates that the time plan computes with: a device's figures, and what stages reach.

`Rates` are a device's peaks, or what `qwen3-distill calibrate` measured on it. `EFFICIENCY` is the
share of them that each stage reaches. It was fitted on one kind of device, an H200 (`FITTED_ON`
lists the results), and is used for all.
"""

from dataclasses import dataclass

from qwen3_distill.planning.calibration import Calibration
from qwen3_distill.planning.peaks import GIGA, MICRO, TERA, DevicePeaks, find_device


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The peaks of one device, in SI units."""

    name: str
    origin: str
    """Where the figures are from, for people."""
    calibrated: bool
    bf16_flops: float
    """Dense bfloat16 products per second, in operations."""
    fp8_flops: float | None
    """Dense FP8 products; None: FP8 weights are widened, and save memory only."""
    fp32_flops: float
    bandwidth: float
    """Bytes per second."""
    weight_bandwidth: float
    """Bytes per second of weights that few rows pass through."""
    graph_kernel_s: float
    """Time of a small kernel within a CUDA graph."""
    launch_s: float
    """Host's time for one kernel launched by itself."""
    unified: bool = False
    """Whether CPU and GPU share one memory."""
    hopper: bool = False
    """Whether the device has compute capability 9.0."""

    def products(self, *, fp8: bool) -> float:
        """Operations per second of a linear layer's products."""
        return self.fp8_flops if fp8 and self.fp8_flops is not None else self.bf16_flops


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of a device's peaks that stages reach, and their costs besides."""

    decode_products: float
    """Share of bandwidth and of products in a decode step's linear layers."""
    kv_reads: float
    """Share of the bandwidth with which decode attention reads the cache."""
    logits_passes: float
    """Times that sampling reads or writes a float32 row of logits."""
    decode_kernels_per_layer: float
    """Small kernels of a layer in a decode step: norms, rotary embedding, activation."""
    decode_step_s: float
    """Time of a decode step that depends on neither model nor batch: the engine's scheduling."""
    score_fp8: float
    """Share of the FP8 peak in scoring, with a scale per channel."""
    score_fp8_blocks: float
    """The same with an FP8 checkpoint's scales per block."""
    candidates_s_per_token: float
    """Seconds of SGLang's server for each token that it names its 16 most likely tokens at."""
    prefill: float
    """Share of the bf16 peak in prefill and in scoring without FP8."""
    train: float
    """Share of the bf16 peak in the linear layers of forward and backward passes."""
    train_masked_attention: float
    """The same in attention over padded sequences of different lengths."""
    train_own_attention: float
    """Rate of unsloth's layers with our attention, for shared prompts, over that with theirs, for a
    token that is computed."""
    train_packed_rows: float
    """The same for rows of different lengths that are packed."""
    train_fp8_backward: float
    """Rate of training with frozen layers in FP8 for the backward pass, over that as loaded."""
    train_candidates: float
    """Rate of training with 16 candidates of the teacher, over that with the sampled token."""
    publish_passes: float
    """Times that the bandwidth passes over a student's weights when whole weights are pushed."""
    publish_adapter_s: float
    """Seconds to push an adapter."""
    host_s_per_rollout: float
    """Seconds of the controller per rollout in which no stage is at work: records, digests.
    Answers are verified beside the learner."""
    streaming_mps: float
    """Time of a streaming step over the sum of its stages' own, with MPS."""
    streaming_slices: float
    """The same without MPS."""


EFFICIENCY = Efficiency(
    decode_products=0.741,
    kv_reads=0.592,
    logits_passes=16.0,
    decode_kernels_per_layer=7.01,
    decode_step_s=0.909e-3,
    score_fp8=0.424,
    score_fp8_blocks=0.306,
    candidates_s_per_token=2.98e-6,
    prefill=0.434,
    train=0.434,
    train_masked_attention=0.152,
    train_own_attention=0.936,
    train_packed_rows=0.757,
    train_fp8_backward=1.071,
    train_candidates=0.979,
    publish_passes=116,
    publish_adapter_s=0.3,
    host_s_per_rollout=3.32e-4,
    streaming_mps=0.927,
    streaming_slices=1.48,
)

FITTED_ON: dict[str, str] = {
    "decode_products": "h200_decode_processes: matrix products of a decode step",
    "kv_reads": "h200_decode_processes: attention of a decode step",
    "logits_passes": "h200_decode_processes: sampling of a decode step",
    "decode_kernels_per_layer": "h200_decode_processes: norms, rotary embedding, activation",
    "decode_step_s": "h200_overlap_micro_batch_8192: longtail8 sequential, sampling",
    "score_fp8": "h200_stages_micro_batch_5120: score",
    "score_fp8_blocks": "h200_stages_micro_batch_5120: 32B FP8 teacher, scoring",
    "candidates_s_per_token": "h200_shipped_streaming: scoring with the top 16, less without",
    "prefill": "taken to be train",
    "train": "h200_stages_micro_batch_5120: train_off",
    "train_masked_attention": "h200_overlap_micro_batch_8192: longtail8 sequential, training",
    "train_own_attention": "h200_rows_once: unsloth_shared_128x512_n4 over unsloth_128x512_n4",
    "train_packed_rows": "h200_rows: unsloth_packed_128xlongtail8_n1 over unsloth_128xlongtail8_n1",
    "train_fp8_backward": "h200_fp8_learners_cudnn: unsloth_fp8_backward_128x512_n4 over "
    "unsloth_128x512_n4",
    "train_candidates": "h200_rows_divided: unsloth_top16_128x512_n4 over unsloth_128x512_n4",
    "publish_passes": "h200_stages_micro_batch_5120: opd, publishing",
    "publish_adapter_s": "assumed",
    "host_s_per_rollout": "h200_start: warm_start_s step 2, host",
    "streaming_mps": "h200_overlap_micro_batch_8192: longtail8 streaming, step",
    "streaming_slices": "h200_overlap: longtail8 streaming without MPS, step",
}
"""The row of `benchmarks/results` that each share was fitted on
(`python -m benchmarks.speed.time_plan --fit`)."""

ATTENTION_SHARE = 0.5
"""Share of the bf16 peak in attention's products outside of decoding; assumed."""
FLOAT32_SHARE = 0.85
"""Share of the float32 peak in float32 products; assumed."""
BANDWIDTH_SHARE = 0.8
"""Share of the bandwidth in passes over logits, casts and optimizer states; assumed."""
EAGER_KERNELS_PER_LAYER = 14
"""Kernels of a layer's decode step in vLLM without CUDA graphs; assumed."""
EMBEDDED_KERNELS_PER_LAYER = 40
"""The same in the embedded engine, which fuses nothing; assumed."""
TRAIN_KERNELS_PER_LAYER = 90
"""Kernels of a layer's forward and backward pass in training; assumed."""
SLOW_HOST_S_PER_LAYER = {"as_loaded": 7.43e-3, "fp8_backward": 8.25e-3}
"""Seconds of a layer's forward and backward pass with unsloth on a slow host, as it takes them to
launch, by `training.base_precision`: h200_rows_5120, where the GPU has less to do."""
ADAPTER_KERNELS_PER_LAYER = 8
"""Further kernels of a layer's decode step with an adapter beside the weights; assumed."""

REFERENCE_BF16 = 0.676
"""Share of its bfloat16 peak that `calibrate` reaches on an H200, where the shares were fitted:
h200_calibration, one run. The next ones: of its FP8 and float32 peaks, of its bandwidth in copies
and in decode-like reads, and of the times of a kernel that the table has."""
REFERENCE_FP8 = 0.597
REFERENCE_FP32 = 0.766
REFERENCE_BANDWIDTH = 0.889
REFERENCE_DECODE = 0.812
REFERENCE_LAUNCH = 0.975
REFERENCE_GRAPH_KERNEL = 0.454


def peak_rates(device: DevicePeaks) -> Rates:
    """Return the rates of a device's data sheet."""
    return Rates(
        name=device.label,
        origin=f"peak figures: {device.source}",
        calibrated=False,
        bf16_flops=device.bf16_tflops * TERA,
        fp8_flops=None if device.fp8_tflops is None else device.fp8_tflops * TERA,
        fp32_flops=device.fp32_tflops * TERA,
        bandwidth=device.bandwidth_gbs * GIGA,
        weight_bandwidth=device.bandwidth_gbs * GIGA,
        graph_kernel_s=device.graph_kernel_us * MICRO,
        launch_s=device.launch_us * MICRO,
        unified=device.unified,
        hopper=device.hopper,
    )


def calibrated_rates(measured: Calibration) -> Rates:
    """Return the rates of a device that `calibrate` measured.

    Shares of `EFFICIENCY` are those of an H200's peaks. So a measured figure is divided by the
    share of its peak that the same measurement reaches there; so is a time, since a kernel that
    does nothing takes less than those that were counted.
    """
    fp8, known = measured.fp8_tflops, find_device(measured.device)
    graph_us, launch_s = measured.graph_kernel_us, measured.launch_us * MICRO / REFERENCE_LAUNCH
    return Rates(
        name=measured.device,
        origin=f"measured by `qwen3-distill calibrate` on {measured.measured_at}",
        calibrated=True,
        bf16_flops=measured.bf16_tflops * TERA / REFERENCE_BF16,
        fp8_flops=None if fp8 is None else fp8 * TERA / REFERENCE_FP8,
        fp32_flops=measured.fp32_tflops * TERA / REFERENCE_FP32,
        bandwidth=measured.bandwidth_gbs * GIGA / REFERENCE_BANDWIDTH,
        weight_bandwidth=measured.decode_gbs * GIGA / REFERENCE_DECODE,
        graph_kernel_s=launch_s if graph_us is None else graph_us * MICRO / REFERENCE_GRAPH_KERNEL,
        launch_s=launch_s,
        unified=measured.kind == "cpu" or (known is not None and known.unified),
        hopper=known is not None and known.hopper,
    )
