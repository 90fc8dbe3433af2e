"""What tests/ and bench/ share: cases, error measures, costs and measured roofs, the interpreter
guard."""
