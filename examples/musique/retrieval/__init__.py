"""Search over passages: BM25 or dense vectors, built by a Ray job, served by Ray Serve. See docs/musique.md."""
