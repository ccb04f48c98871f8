"""Marks that say an image is synthetic, and what still holds of them afterwards.

Three of them, each for what the others lose: a C2PA manifest signed with the site's own key (any
program that saves the picture anew drops it), an invisible watermark (weak against intent), and a
registry of the hashes of all pixels that were drawn (good for exact copies).

>>> marker = Marker.open(Path("/var/lib/dermaflux/marks"), bundle="sha256:5f3a...")
>>> marked = marker.mark(pixels, pipeline.record(request))         # .data is the file
>>> marker.verify(marked.data).shown
True
"""

from dermaflux.marks.certificates import MarksError
from dermaflux.marks.keys import Keys
from dermaflux.marks.marking import Marked, Marker
from dermaflux.marks.registry import Known, Registry
from dermaflux.marks.verify import Verdict, verify

__all__ = ["Keys", "Known", "Marked", "Marker", "MarksError", "Registry", "Verdict", "verify"]
