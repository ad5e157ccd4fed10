"""Ask the teacher once: its answers are kept on disk and read back as if it were there."""

from stillroom.recording.codecs import Codec, Everything, Features, Kept, Sampled, TopK
from stillroom.recording.record import record
from stillroom.recording.store import Recording, open_recording

__all__ = ["Codec", "Everything", "Features", "Kept", "Recording", "Sampled", "TopK", "open_recording", "record"]
