//! Walking a tar without reading its members.
