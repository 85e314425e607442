"""A run's own hooks: Lightning callbacks that belong to this checkout and use the public interface only."""
