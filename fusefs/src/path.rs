//! Names from artifacts, cleaned.
