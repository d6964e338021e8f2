"""The `osm` command: looks at the first word and imports no more than that word needs."""

def main() -> None:
    raise SystemExit("osm: not built yet")
