"""Requests in (validate, admit) and out (collect, rank, deliver)."""
