"""Names of a video's fields on their way from the API server to the worker."""

VIDEO_FRAMES = "video_frames"
"""Field of a video's data: resized frames, uint8 (T, H, W, C)."""
PIXEL_NORMALIZATION = "pixel_normalization"
"""Field of a video's data: mean and standard deviation of each channel, float32 (2, C), in units of
uint8's values. Frames and this come together."""

FRAME_OF = "video_frame_of"
"""Field of a video's data: which of ``VIDEO_FRAMES`` each of its T frames is, int64 (T,), kept on
the CPU. Only where a frame repeats the one before it and the video is compressed: the tower then
encodes it once. (Uncompressed, the tower must see what it sees in stock vLLM.)"""

PATCH_ANCHORS = "video_patch_anchors"
"""Field of a video's data: the frame whose patch stands for each patch, at the same place, int16
(T, P) over the T frames of ``VIDEO_FRAMES`` and the tower's P patches a frame, kept on the CPU. A
patch that stands for itself names its own frame. Only where the tower computes fewer than all; see
``scissor_vllm.patch_merging``."""

VIDEO_IDENTITY = "video_identity"
"""Field of a video's data: hash of its fields above, int64 (4,), kept on the CPU. Only where the
model keeps what its tower makes of them."""

FRAME_SIZE = "video_frame_size"
"""Field of a video's data: height and width of its frames, int64 (2,), kept on the CPU. Only where
its pixels are frames, not patches: rows of the same number and length, but a frame's rows of pixels
one after the other."""

NUM_RETAINED = "num_retained"
"""Field of each video's data: K, an int64 of its own, kept on the CPU."""

NUM_VIDEO_TOKENS = "num_video_tokens"
"""The same for N, by which the scheduler bounds what the tower does in one step."""

VIDEO_TEXT = "video_text"
"""Field of a video's data: the text within it, int64 (2, n), kept on the CPU. The first row holds
token ids, the second how many of the uncompressed video's tokens stand before each."""
