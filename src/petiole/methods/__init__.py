"""Methods that adapt one backbone to one task, by family."""
