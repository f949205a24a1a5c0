"""Models whose video tokens are compressed, one file a family.

A file says what its family changes against vLLM's class; what several share is in ``frames`` (their
tower takes frames one by one) and ``patch_grid`` (a grid of patches of any size, M-RoPE), what all
share in ``scissor_vllm.frontend.processor`` and ``scissor_vllm.worker.video_compression``.
``carried_positions`` is of those whose tokens keep their positions.
"""

MODELS = {
    "LlavaNextVideoForConditionalGeneration": (
        "scissor_vllm.models.llava_next_video:LlavaNextVideoForConditionalGeneration"
    ),
    "LlavaOnevisionForConditionalGeneration": (
        "scissor_vllm.models.llava_onevision:LlavaOnevisionForConditionalGeneration"
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "scissor_vllm.models.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration"
    ),
    "Qwen3VLForConditionalGeneration": (
        "scissor_vllm.models.qwen3_vl:Qwen3VLForConditionalGeneration"
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        "scissor_vllm.models.qwen3_vl:Qwen3VLMoeForConditionalGeneration"
    ),
}
"""Architecture, as a checkpoint's config names it, to our class."""
