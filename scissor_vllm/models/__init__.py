"""Models whose video tokens are compressed, one file a family.

A file holds what its family changes in vLLM's class. Several families share a module:

- ``frames``: the tower takes frames one by one.
- ``frame_runs``: text stands between a video's frames.
- ``patch_grid``: a grid of patches of any size, with M-RoPE.
- ``carried_positions``: tokens keep their positions.

All families share ``processing_info`` and ``processor`` of ``scissor_vllm.frontend``, and
``scissor_vllm.worker.video_compression``.
"""

_MODULES = {
    "Cosmos3ForConditionalGeneration": "cosmos3",
    "Exaone4_5_ForConditionalGeneration": "exaone4_5",
    "Gemma4ForConditionalGeneration": "gemma4",
    "Glm4vForConditionalGeneration": "glm4v",
    "Glm4vMoeForConditionalGeneration": "glm4v",
    "InternS1ForConditionalGeneration": "internvl",
    "InternS1ProForConditionalGeneration": "interns1_pro",
    "InternS2MobiusForConditionalGeneration": "interns2_mobius",
    "InternS2PreviewForConditionalGeneration": "interns2_preview",
    "InternVLChatModel": "internvl",
    "InternVLForConditionalGeneration": "internvl:InternS1ForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration": "llava_next_video",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "NemotronH_Nano_Omni_Reasoning_V3": "nemotron_nano_vl:NemotronH_Nano_VL_V2",
    "NemotronH_Nano_VL_V2": "nemotron_nano_vl",
    "NemotronH_Omni_Reasoning_V3": "nemotron_nano_vl:NemotronH_Nano_VL_V2",
    "NemotronH_Super_Omni_Reasoning_V3": "nemotron_nano_vl:NemotronH_Nano_VL_V2",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5",
}
"""Architecture, as a checkpoint's config names it, to its module here and, where it has another
name, its class."""

MODELS = {
    architecture: f"{__name__}.{module if ':' in module else f'{module}:{architecture}'}"
    for architecture, module in _MODULES.items()
}
"""Architecture, as a checkpoint's config names it, to our class."""

IMAGE_RUN_MODELS = (
    "LlavaNextVideoForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)
"""Architectures of which runs of images are compressed as frames: as many equal frames as the
tower's tokens need make an image's tokens its own, and no text of the model's own stands for it."""

MERGING_TOWERS = "SigLIP's tower of LLaVA-OneVision and Qwen-VL's towers"
"""Towers that merge patches."""

FP8_MODELS = (
    "LlavaNextVideoForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
)
"""Architectures whose tower, if it is SigLIP's, can have MLPs in FP8."""

NO_IMAGE_RUNS = (
    "its images cannot stand as frames of a video; runs of images are compressed for "
    f"{', '.join(IMAGE_RUN_MODELS)} only"
)
"""Why they are not, for another."""
