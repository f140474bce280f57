//! What files a layer has and where their bytes lie in its blob.

/// The files of one layer.
#[derive(Debug, Clone)]
pub struct Listing {}
