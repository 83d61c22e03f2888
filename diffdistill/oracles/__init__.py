"""Teachers with exact answers, and a trainable denoiser that can reach them: what every method is tested against."""

from diffdistill.oracles.affine import AffineDenoiser, AffineTable, affine_of
from diffdistill.oracles.gaussian import GaussianTeacher
from diffdistill.oracles.mixture import DataTeacher, MixtureTeacher, integrate

__all__ = ["AffineDenoiser", "AffineTable", "DataTeacher", "GaussianTeacher", "MixtureTeacher", "affine_of", "integrate"]
