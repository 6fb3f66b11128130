// Placeholder translation unit until the scheduler lands.
