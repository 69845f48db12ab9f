from job_fixtures import b, quick

__all__ = ["b", "quick"]
