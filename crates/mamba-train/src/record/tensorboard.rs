//! Event files as TensorBoard reads them: records of protocol buffers, each with check sums.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// Writes scalars into an event file of TensorBoard.
///
/// # Example
/// ```
/// use mamba_train::record::EventWriter;
/// let folder = tempfile::tempdir()?;
/// let mut events = EventWriter::create(folder.path())?;
/// events.scalar(1, "loss", 2.5)?;
/// events.flush()?;
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
/// # Source
/// `tensorflow/core/util/event.proto` and `tensorflow/core/lib/io/record_writer.cc`.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventWriter {
    /// Begins a file of its own in a folder, which is what a run is for TensorBoard.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn create(folder: &Path) -> Result<Self> {
        let now = seconds();
        let path =
            folder.join(format!("events.out.tfevents.{:010}.{}.mamba", now as u64, std::process::id()));
        let file = BufWriter::new(File::create(&path).map_err(|e| Error::io(&path, e))?);
        let mut writer = Self { path, file };
        writer.record(&version_event(now))?;
        writer.flush()?;
        Ok(writer)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a number to the series `tag`.
    ///
    /// # Errors
    /// If the disk is full.
    pub fn scalar(&mut self, step: u64, tag: &str, value: f64) -> Result<()> {
        self.record(&scalar_event(seconds(), step, tag, value as f32))
    }

    /// Makes everything visible to others.
    ///
    /// # Errors
    /// If the disk is full.
    pub fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(|e| Error::io(&self.path, e))
    }

    fn record(&mut self, data: &[u8]) -> Result<()> {
        self.file.write_all(&framed(data)).map_err(|e| Error::io(&self.path, e))
    }
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}

/// Length, its check sum, the data, its check sum.
fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length, &masked(&length).to_le_bytes()[..], data, &masked(data).to_le_bytes()].concat()
}

fn version_event(time: f64) -> Vec<u8> {
    let mut event = vec![];
    field_f64(&mut event, 1, time);
    field_bytes(&mut event, 3, b"brain.Event:2");
    event
}

fn scalar_event(time: f64, step: u64, tag: &str, number: f32) -> Vec<u8> {
    let (mut value, mut summary, mut event) = (vec![], vec![], vec![]);
    field_bytes(&mut value, 1, tag.as_bytes());
    value.push(2 << 3 | 5);
    value.extend(number.to_le_bytes());
    field_bytes(&mut summary, 1, &value);
    field_f64(&mut event, 1, time);
    event.push(2 << 3);
    varint(&mut event, step);
    field_bytes(&mut event, 5, &summary);
    event
}

fn field_f64(message: &mut Vec<u8>, number: u8, value: f64) {
    message.push(number << 3 | 1);
    message.extend(value.to_le_bytes());
}

fn field_bytes(message: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    message.push(number << 3 | 2);
    varint(message, bytes.len() as u64);
    message.extend(bytes);
}

fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

/// The check sum of a record: CRC-32C, rotated and shifted.
fn masked(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: records are short.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of the algorithm, and those of RFC 3720, B.4.
    #[test]
    fn check_sums() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
    }

    /// The bytes of a message, field by field as the format of protocol buffers says.
    #[test]
    fn messages() {
        let event = scalar_event(1.0, 300, "a", 0.5);
        let time = [[9].as_slice(), &1f64.to_le_bytes()].concat();
        let value = [0x0a, 1, b'a', 0x15, 0, 0, 0, 0x3f];
        let summary = [[0x0a, 8].as_slice(), &value].concat();
        let want = [time.as_slice(), &[0x10, 0xac, 0x02], &[0x2a, 10], &summary].concat();
        assert_eq!(event, want);
        let record = framed(&event);
        assert_eq!(record.len(), event.len() + 16);
        assert_eq!(record[..8], (event.len() as u64).to_le_bytes());
        assert_eq!(record[12..12 + event.len()], event);
    }
    /// What TensorBoard 2.21 itself writes of the same two events, byte for byte.
    #[test]
    fn as_tensorboard_writes() {
        let want = "1800000000000000a37f4b220900001040fc54d9411a0d627261696e2e4576656e743a32338d2fe92100000000000000017becf609\
            00006040fc54d94110ac022a130a110a0a6c6f73732f747261696e15dd243e40c5fd668d";
        let version = framed(&version_event(1_700_000_000.25));
        let scalar = framed(&scalar_event(1_700_000_001.5, 300, "loss/train", 2.971));
        let got: String = version.iter().chain(&scalar).map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(got, want);
    }
}
