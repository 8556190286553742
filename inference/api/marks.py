"""What a generated file says of its origin, as the EU's AI Act (Article 50) asks of providers.

    Manifest -> Mark, once -> XMP of each file, with its seed and its candidate's number

The words are those of IPTC's photo metadata (2025.1): a digital source type, and the system used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from xml.sax.saxutils import escape, quoteattr

from dalle.manifest import Manifest
from dalle.versions import OURS, installed
from inference.api.rendering import Mark, Sign

DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAMESPACE = f"urn:{OURS}:1"  # of `seed` and `candidate`, for which IPTC has no words
_NAME_CHARACTERS = 100
_DIGEST_CHARACTERS = 12

# Without a time or an id of its own: equal pictures of equal seeds are equal files.
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about=""
 xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:dalle="{namespace}"
 Iptc4xmpExt:DigitalSourceType="{source_type}"
 Iptc4xmpExt:AISystemUsed={system}
 Iptc4xmpExt:AISystemVersionUsed={version}
 xmp:CreatorTool={tool}
 dalle:seed="{{seed}}"
 dalle:candidate="{{candidate}}"/>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def system_name(manifest: Manifest) -> str:
    """Return the name of the model: the job that trained its transformer, if that is recorded."""
    record = manifest.newest_records().get("transformer")
    name = record.job_name if record else ""
    return f"{OURS} {_printable(name)}".strip()


def system_version(manifest: Manifest) -> str:
    """Return the version of the model: of the library that trained it, and a digest of its files.

    Equal weights have equal versions.
    """
    files = "\n".join(f"{path} {sha256}" for path, sha256 in sorted(manifest.files.items()))
    digest = hashlib.sha256(files.encode()).hexdigest()[:_DIGEST_CHARACTERS]
    return " ".join([*_printable(manifest.library_version).split(), f"weights {digest}"])


def _printable(text: str) -> str:
    """Return what XML can hold of a text from a manifest, and not too much of it."""
    return "".join(each for each in text if each.isprintable())[:_NAME_CHARACTERS]


def mark_of(manifest: Manifest, signer: Callable[[str, str], Sign] | None = None) -> Mark:
    """Return what the files of an artefact's images say.

    signer: name and version of the model -> what adds a signed manifest to a file.
    """
    name, version = system_name(manifest), system_version(manifest)
    tool = f"{OURS} {installed(OURS) or ''}".strip()
    return Mark(
        _PACKET.format(
            namespace=NAMESPACE,
            source_type=escape(DIGITAL_SOURCE_TYPE),
            system=_attribute(name),
            version=_attribute(version),
            tool=_attribute(tool),
        ),
        sign=None if signer is None else signer(name, version),
    )


def _attribute(text: str) -> str:
    """Return a text in quotes, for a packet that is formatted once more."""
    return quoteattr(text).replace("{", "{{").replace("}", "}}")
