"""What travels together: how texts are read, and what may go."""
