"""The commands of `headway`, one per file; each has `main(argv) -> exit code`."""
