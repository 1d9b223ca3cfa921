"""Shrinking: fold what is redundant, choose what stays, re-read it by least squares."""
