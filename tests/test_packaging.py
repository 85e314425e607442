"""The import name `esper` must be ours."""

from importlib.metadata import packages_distributions

import esper


def test_no_other_library_of_the_same_name_is_installed() -> None:
    owners = set(packages_distributions().get("esper", []))
    assert owners <= {"esper-morphogenetic"}, (
        f"{sorted(owners)} also install a package named 'esper': the name on the package index is another library. "
        "Uninstall it (`pip uninstall esper`) or use a fresh environment; ours is called 'esper-morphogenetic'."
    )
    assert hasattr(esper, "MorphableModel")
