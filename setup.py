"""Takes the recipes of configs/ into a built package; everything else is said in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies configs/ to diffdistill/configs in the build; a checkout, or an editable install, reads configs/ itself."""

    def run(self):
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib, "diffdistill", "configs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
