//! Reads the little numbers of a GGUF header, none of which is believed before the bytes have been counted.

/// A place in a file. Errors are for reading behind `<file>: `.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// A number or truth value of fixed size.
pub(super) trait Scalar: Sized {
    const BYTES: usize;

    /// From exactly `BYTES` bytes; `None` if they do not stand for a value.
    fn from_bytes(bytes: &[u8]) -> Option<Self>;
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl Scalar for $number {
            const BYTES: usize = size_of::<Self>();

            fn from_bytes(bytes: &[u8]) -> Option<Self> {
                Some(Self::from_le_bytes(bytes.try_into().ok()?))
            }
        }
    )*};
}

numbers!(u8, i8, u16, i16, u32, i32, f32, u64, i64, f64);

impl Scalar for bool {
    const BYTES: usize = 1;

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }
}

impl<'a> Cursor<'a> {
    /// At byte `at` of a file, or at its end if it has fewer bytes.
    pub fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at: at.min(bytes.len()) }
    }

    pub fn position(&self) -> usize {
        self.at
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| {
            format!("is truncated: {count} bytes are needed at byte {}, {} are there", self.at, self.left())
        })?;
        let bytes = &self.bytes[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    pub fn scalar<T: Scalar>(&mut self) -> Result<T, String> {
        let at = self.at;
        T::from_bytes(self.take(T::BYTES)?).ok_or_else(|| format!("has no truth value at byte {at}"))
    }

    /// A count of things that take at least `least` bytes each, all of which lie behind it.
    pub fn count(&mut self, of: &str, least: usize) -> Result<usize, String> {
        let count: u64 = self.scalar()?;
        let most = self.left() / least.max(1);
        usize::try_from(count).ok().filter(|count| *count <= most).ok_or_else(|| {
            format!("is truncated: it would have {count} {of}, {} bytes are left for them", self.left())
        })
    }

    pub fn scalars<T: Scalar>(&mut self, of: &str) -> Result<Vec<T>, String> {
        let count = self.count(of, T::BYTES)?;
        let at = self.at;
        let bytes = self.take(count * T::BYTES)?;
        let values = bytes.chunks_exact(T::BYTES).map(T::from_bytes).collect::<Option<Vec<T>>>();
        values.ok_or_else(|| format!("has bytes that are no truth values from byte {at} on"))
    }

    pub fn text(&mut self) -> Result<&'a str, String> {
        let count = self.count("bytes of text", 1)?;
        let at = self.at;
        std::str::from_utf8(self.take(count)?)
            .map_err(|_| format!("has a text that is not UTF-8 at byte {at}"))
    }
}
