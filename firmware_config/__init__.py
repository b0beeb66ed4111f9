"""Configuration: the one loader (`loader.py`), meter profiles (`meters/*.toml`), example configs (`examples/*.toml`).

A new meter family is one new file in `meters/`; no code. Whoever has settings describes them as frozen dataclasses and
reads them with `loader.load_config`.
"""
