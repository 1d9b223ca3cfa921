"""What dslm says about models: tables for people."""
