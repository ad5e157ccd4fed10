"""Ask the teacher once: its answers are kept on disk and read back as if it were there."""

from stillroom.recording.codec import Codec, Kept, bytes_kept
from stillroom.recording.codecs import Everything, Features, Sampled, TopK
from stillroom.recording.hidden import Hidden
from stillroom.recording.likely import Likely
from stillroom.recording.record import record
from stillroom.recording.store import Recording, open_recording
from stillroom.recording.texts import Texts

__all__ = [
    "Codec",
    "Everything",
    "Features",
    "Hidden",
    "Kept",
    "Likely",
    "Recording",
    "Sampled",
    "Texts",
    "TopK",
    "bytes_kept",
    "open_recording",
    "record",
]
