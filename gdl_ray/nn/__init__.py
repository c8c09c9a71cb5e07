"""Network blocks that several families share: torch only, described by shapes."""
