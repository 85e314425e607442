"""Only test files are collected: the models' libraries take seconds to import, and timm is not in the environment."""

from pathlib import Path

collect_ignore = [path.name for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")]
