"""Export of students to stock diffusers, and the check that stock diffusers makes the same images of them.

`export` writes a folder, `verify` checks one, `plan` says before training whether and how a student can leave. The names are
those of their modules, too: `from diffdistill.export import export` gives the function.
"""

from diffdistill.export.card import snippet
from diffdistill.export.export import export
from diffdistill.export.manifest import Manifest, Verification
from diffdistill.export.plan import Plan, plan
from diffdistill.export.verify import VerificationError, verify, verify_all

__all__ = ["Manifest", "Plan", "Verification", "VerificationError", "export", "plan", "snippet", "verify", "verify_all"]
