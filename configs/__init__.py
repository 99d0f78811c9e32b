"""Presets in TOML, for ``--config NAME``: of the demo here, of training in train/, of runs in recipes/."""
