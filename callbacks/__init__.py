"""Lightning callbacks: when curation happens."""
