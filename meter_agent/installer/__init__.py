"""What an installer uses at the meter cabinet and a running agent never loads: scan, simulate, profiles, status."""
