//! From text files to batches: encoded once into a file of tokens, read from there piece by piece in any order.
//!
//! Documents are cut into rows, and rows come packed (one behind another, each read as if it were alone) or padded: [`Batching`].
//!
//! Nothing here holds more than a batch, a piece of a text or a list of rows in memory, and where a training stands in
//! its data is two numbers: [`Position`].

mod augment;
mod batch;
mod dataset;
mod encode;
mod order;
mod tokens;

pub use augment::{Augmentation, TokenSplits};
pub use batch::{Batch, Batching, IGNORED, Share};
pub use dataset::{Batches, Dataset, Position};
pub use encode::{Encoding, encode, pieces};
pub use order::Permutation;
pub use tokens::{TokenFile, TokenWriter};
