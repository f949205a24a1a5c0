"""Names of the fields with which a video travels from the API server to the worker."""

VIDEO_FRAMES = "video_frames"
"""Field of a video's data: resized frames, uint8 (T, H, W, C), kept on the CPU: the model copies
them where the tower takes them."""
PIXEL_NORMALIZATION = "pixel_normalization"
"""Field of a video's data: mean and standard deviation of each channel, float32 (2, C), in units of
8-bit pixels. It comes with ``VIDEO_FRAMES`` and ``VIDEO_PLACES``."""

FRAME_OF = "video_frame_of"
"""Field of a video's data: for each of its T frames the number of the frame that is sent for it,
int64 (T,), kept on the CPU. Present if the video is compressed and a frame repeats the previous
one, which the tower then encodes once. (Of an uncompressed video the tower sees all frames, as in
stock vLLM.)"""

PATCH_ANCHORS = "video_patch_anchors"
"""Field of a video's data: for each patch the frame whose patch at the same place replaces it,
int16 (T, P) for T frames that are sent, of P patches, kept on the CPU. A patch that is not
replaced names its own frame. Present if a patch is replaced; see ``scissor_vllm.patch_merging``."""

VIDEO_PLACES = "video_places"
"""Field of a video's data: pixels of the M places that the tower computes, frame by frame, uint8
(M, n, side, side, C), kept on the CPU. A place is a patch, or the patches of a token in n frames.
It comes with ``PATCH_ANCHORS`` in place of frames, unless the video keeps all of its tokens."""

TOWER_FP8 = "video_tower_fp8"
"""Field of a video's data: true, a bool of its own, kept on the CPU. Present if the tower's MLPs
are computed in FP8 for it."""

VIDEO_IDENTITY = "video_identity"
"""Field of a video's data: hash of its fields above, int64 (4,), kept on the CPU. Present if
the video is compressed and the feature cache is on."""

FRAME_SIZE = "video_frame_size"
"""Field of a video's data: height and width of its frames, int64 (2,), kept on the CPU. Present if
the pixels are frames in place of patches: a tensor of the patches' shape with a frame's pixels in
their order."""

NUM_RETAINED = "num_retained"
"""Field of each video's data: K, an int64 scalar, kept on the CPU."""

NUM_VIDEO_TOKENS = "num_video_tokens"
"""The same for N."""

NUM_ENCODED_TOKENS = "num_encoded_tokens"
"""The same for the number of tokens that the tower computes, by which the scheduler bounds the
encoding of a step."""

IMAGES = "images"
"""``video_backend`` in the metadata of a video that is a run of images. Its ``total_num_frames`` is
their number, its ``frames_indices`` name each image's frames."""

KEEPS_EVERY_FRAME = "keeps_every_frame"
"""Field of each video's data where one of the request is a run of images: whether each frame, as
the tower's tokens have them, keeps at least one row; a bool of its own, kept on the CPU."""

VIDEO_TEXT = "video_text"
"""Field of a video's data: the text within it, int64 (2, n), kept on the CPU. The first row holds
token ids, the second the number of the uncompressed video's tokens before each."""

KEPT_ON_CPU = (
    *(VIDEO_FRAMES, VIDEO_PLACES, FRAME_OF, PATCH_ANCHORS, TOWER_FP8, VIDEO_IDENTITY),
    *(NUM_RETAINED, NUM_VIDEO_TOKENS, NUM_ENCODED_TOKENS, KEEPS_EVERY_FRAME),
)
"""Fields of all families' videos that vLLM does not copy to the model's device."""
