//! Processes in a ring over TCP.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor, WithDType};

use super::collective::{Collective, known};
use super::rendezvous::{Neighbours, Place, Seeker, listen};
use super::{TIMEOUT, failed};
use crate::Result;
use crate::parallel::World;

/// Processes that each send to the next one and hear from the one before, over TCP: on one machine or on several, for tensors
/// on any device, which go through the CPU.
///
/// A sum goes around twice. Every process adds up a part of the tensor, in the order of the ranks, while the parts of the others
/// pass by, then all parts are handed around: each sends and receives `2 (n - 1) / n` of the tensor, however many
/// processes there are, and all have the same bits.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use mamba_train::parallel::{Collective, Ring};
/// let sum = |ring: Ring| -> mamba_train::Result<Vec<f32>> {
///     let x = Tensor::new(&[1f32, ring.rank() as f32], &Device::Cpu)?;
///     Ok(ring.all_reduce_sum(&x)?.to_vec1()?)
/// };
/// let ranks: Vec<_> = Ring::threads(3)?.into_iter().map(|ring| std::thread::spawn(move || sum(ring))).collect();
/// for rank in ranks {
///     assert_eq!(rank.join().expect("no panic")?, [3.0, 0.0 + 1.0 + 2.0]);
/// }
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
/// # Source
/// Patarasu and Yuan, 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
#[derive(Debug)]
pub struct Ring {
    rank: usize,
    size: usize,
    timeout: Duration,
    link: Mutex<Link>,
}

impl Ring {
    /// Finds the others and waits until all are there; `timeout` is for that, and later for each answer of a neighbour.
    ///
    /// # Errors
    /// If one does not come in time, another program is in its place, or there is no port to listen at.
    pub fn connect(world: &World, timeout: Duration) -> Result<Self> {
        let place = match world.rank {
            0 => Place::Here(listen(world.port).map_err(|e| {
                let message = format!("rank 0 cannot listen at port {} (MASTER_PORT): {e}", world.port);
                failed(0, world.size, message)
            })?),
            _ => Place::There(world.master.clone(), world.port),
        };
        Self::meet(place, world.rank, world.size, timeout)
    }

    /// A ring of as many threads of this process: one for each.
    ///
    /// # Errors
    /// If there is no port to listen at.
    pub fn threads(size: usize) -> Result<Vec<Self>> {
        let problem = |e: std::io::Error| failed(0, size, e);
        let listener = listen(0).map_err(problem)?;
        let port = listener.local_addr().map_err(problem)?.port();
        let mut places = vec![Place::Here(listener)];
        places.extend((1..size).map(|_| Place::There("localhost".into(), port)));
        std::thread::scope(|scope| {
            let meeting = |(rank, place)| scope.spawn(move || Self::meet(place, rank, size, TIMEOUT));
            let rings: Vec<_> = places.into_iter().enumerate().map(meeting).collect();
            let joined = |ring: std::thread::ScopedJoinHandle<Result<Self>>| {
                ring.join().unwrap_or_else(|_| Err(failed(0, size, "a thread panicked")))
            };
            rings.into_iter().map(joined).collect()
        })
    }

    fn meet(place: Place, rank: usize, size: usize, timeout: Duration) -> Result<Self> {
        let link = match size {
            0 | 1 => Link::closed(),
            _ => {
                let met = Seeker { rank, size, deadline: Instant::now() + timeout }.meet(place)?;
                Link::new(met, timeout).map_err(|e| failed(rank, size, e))?
            }
        };
        Ok(Self { rank, size: size.max(1), timeout, link: Mutex::new(link) })
    }

    /// Fails if a neighbour is known to be gone; waits for nothing.
    #[cfg(feature = "cuda")]
    pub(super) fn check(&self) -> Result<()> {
        let mut link = self.lock();
        match link.is_cut() {
            false => Ok(()),
            // Reading says who it was, and tells the others.
            true => self.within(&mut link, |exchange| exchange.receive(0).map(drop)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn previous(&self) -> usize {
        (self.rank + self.size - 1) % self.size
    }

    /// One operation; after one that failed there are no others.
    fn operate<T>(&self, f: impl FnOnce(&mut Exchange) -> Result<T, String>) -> Result<T> {
        let mut link = self.lock();
        link.operation += 1;
        self.within(&mut link, f)
    }

    fn within<T>(&self, link: &mut Link, f: impl FnOnce(&mut Exchange) -> Result<T, String>) -> Result<T> {
        let outcome = match &link.broken {
            Some(message) => Err(message.clone()),
            None => f(&mut Exchange { ring: self, link }),
        };
        outcome.map_err(|message| {
            link.part(&message);
            failed(self.rank, self.size, message)
        })
    }

    /// Adds `mine` of all processes, in place.
    fn reduce<T: Element>(&self, mine: &mut [T]) -> Result<()> {
        let (n, rank, len) = (self.size, self.rank, mine.len());
        let part = |i: usize| len * (i % n) / n..len * (i % n + 1) / n;
        self.operate(|exchange| {
            for step in 0..n - 1 {
                let (send, receive) = (part(n + rank - step), part(n + rank - step - 1));
                exchange.send(T::bytes(&mine[send]))?;
                let received = exchange.receive(receive.len() * T::SIZE)?;
                let received = received.chunks_exact(T::SIZE);
                mine[receive].iter_mut().zip(received).for_each(|(x, y)| *x = T::from_bytes(y).plus(*x));
            }
            for step in 0..n - 1 {
                let (send, receive) = (part(n + rank + 1 - step), part(n + rank - step));
                exchange.send(T::bytes(&mine[send]))?;
                let received = exchange.receive(receive.len() * T::SIZE)?;
                let received = received.chunks_exact(T::SIZE);
                mine[receive].iter_mut().zip(received).for_each(|(x, y)| *x = T::from_bytes(y));
            }
            Ok(())
        })
    }

    /// Replaces `mine` by that of rank 0, which goes around in pieces.
    fn hand_around<T: Element>(&self, mine: &mut [T]) -> Result<()> {
        const PIECE: usize = 1 << 17;
        self.operate(|exchange| {
            for piece in mine.chunks_mut(PIECE) {
                if self.rank > 0 {
                    let received = exchange.receive(piece.len() * T::SIZE)?;
                    piece
                        .iter_mut()
                        .zip(received.chunks_exact(T::SIZE))
                        .for_each(|(x, y)| *x = T::from_bytes(y));
                }
                if self.rank + 1 < self.size {
                    exchange.send(T::bytes(piece))?;
                }
            }
            Ok(())
        })
    }

    /// Runs an operation over the elements of a tensor.
    fn over(&self, x: &Tensor, operation: Operation) -> Result<Tensor> {
        known(x)?;
        if self.size == 1 {
            return Ok(x.clone());
        }
        match x.dtype() {
            DType::F64 => self.over_elements::<f64>(x, operation),
            _ => self.over_elements::<f32>(x, operation),
        }
    }

    fn over_elements<T: Element>(&self, x: &Tensor, operation: Operation) -> Result<Tensor> {
        let mut values = x.flatten_all()?.to_vec1::<T>()?;
        match operation {
            Operation::Sum => self.reduce(&mut values)?,
            Operation::Broadcast => self.hand_around(&mut values)?,
        }
        Ok(Tensor::from_vec(values, x.shape(), &Device::Cpu)?.to_device(x.device())?)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.lock().close();
    }
}

#[derive(Debug, Clone, Copy)]
enum Operation {
    Sum,
    Broadcast,
}

impl Collective for Ring {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.size
    }

    fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor> {
        self.over(x, Operation::Sum)
    }

    fn broadcast(&self, x: &Tensor) -> Result<Tensor> {
        self.over(x, Operation::Broadcast)
    }
}

/// What is sent as bytes.
trait Element: WithDType {
    const SIZE: usize = size_of::<Self>();
    fn bytes(values: &[Self]) -> Vec<u8>;
    fn from_bytes(bytes: &[u8]) -> Self;
    fn plus(self, other: Self) -> Self;
}

macro_rules! element {
    ($($t:ty),*) => {$(
        impl Element for $t {
            fn bytes(values: &[Self]) -> Vec<u8> {
                let mut bytes = vec![0; values.len() * Self::SIZE];
                let places = bytes.chunks_exact_mut(Self::SIZE);
                places.zip(values).for_each(|(place, x)| place.copy_from_slice(&x.to_le_bytes()));
                bytes
            }

            fn from_bytes(bytes: &[u8]) -> Self {
                let mut own = [0; size_of::<Self>()];
                own.copy_from_slice(bytes);
                Self::from_le_bytes(own)
            }

            fn plus(self, other: Self) -> Self {
                self + other
            }
        }
    )*};
}
element!(f32, f64);

/// The two connections of a process. A thread of its own writes, so that all processes can send at once.
#[derive(Debug)]
struct Link {
    previous: Option<TcpStream>,
    next: Option<TcpStream>,
    queue: Option<Sender<Vec<u8>>>,
    writer: Option<JoinHandle<()>>,
    /// What the writer met with.
    unsent: Arc<OnceLock<String>>,
    buffer: Vec<u8>,
    /// How many operations there were: neighbours must be at the same one.
    operation: u64,
    /// Why there will be no more.
    broken: Option<String>,
}

/// In the place of the number of an operation, before the words of one who leaves.
const FAREWELL: u64 = u64::MAX;

/// A number of an operation, and the number of bytes that follow.
const HEADER: usize = 16;

fn header(operation: u64, len: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&operation.to_le_bytes());
    header[8..].copy_from_slice(&(len as u64).to_le_bytes());
    header
}

impl Link {
    fn closed() -> Self {
        Self {
            previous: None,
            next: None,
            queue: None,
            writer: None,
            unsent: Arc::default(),
            buffer: vec![],
            operation: 0,
            broken: None,
        }
    }

    fn new(Neighbours { next, previous }: Neighbours, timeout: Duration) -> std::io::Result<Self> {
        for stream in [&next, &previous] {
            stream.set_nodelay(true)?;
        }
        previous.set_read_timeout(Some(timeout))?;
        next.set_write_timeout(Some(timeout))?;
        let (queue, messages) = channel();
        let (stream, unsent) = (next.try_clone()?, Arc::default());
        let met_with = Arc::clone(&unsent);
        let writer = std::thread::spawn(move || write_all(stream, messages, &met_with));
        Ok(Self {
            previous: Some(previous),
            next: Some(next),
            queue: Some(queue),
            writer: Some(writer),
            unsent,
            ..Self::closed()
        })
    }

    /// Whether the connection to the one before has ended, or a farewell has come.
    #[cfg(feature = "cuda")]
    fn is_cut(&mut self) -> bool {
        let Some(previous) = &self.previous else { return false };
        let mut next = [0; HEADER];
        let peeked = previous.set_nonblocking(true).and_then(|()| {
            let peeked = previous.peek(&mut next);
            previous.set_nonblocking(false)?;
            peeked
        });
        match peeked {
            Ok(0) => true,
            Ok(len) => len >= 8 && next[..8] == FAREWELL.to_le_bytes(),
            Err(e) => e.kind() != ErrorKind::WouldBlock,
        }
    }

    /// Leaves the ring, and says why.
    fn part(&mut self, message: &str) {
        if self.broken.is_some() {
            return;
        }
        self.broken = Some(message.to_owned());
        if let Some(queue) = &self.queue {
            let mut farewell = header(FAREWELL, message.len()).to_vec();
            farewell.extend(message.as_bytes());
            let _ = queue.send(farewell); // the next one may be the one who is gone
        }
        self.close();
    }

    /// Sends what is left, then ends both connections.
    fn close(&mut self) {
        self.queue = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
        for stream in [self.next.take(), self.previous.take()].into_iter().flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn write_all(mut stream: TcpStream, messages: Receiver<Vec<u8>>, unsent: &OnceLock<String>) {
    for message in messages {
        if let Err(e) = stream.write_all(&message) {
            let _ = unsent.set(e.to_string());
            return;
        }
    }
}

/// An operation under way. Errors are what others are to hear.
struct Exchange<'a> {
    ring: &'a Ring,
    link: &'a mut Link,
}

impl Exchange<'_> {
    fn send(&mut self, bytes: Vec<u8>) -> Result<(), String> {
        let gone = |link: &Link| {
            let next = (self.ring.rank + 1) % self.ring.size;
            let cause = link.unsent.get().map_or(String::new(), |cause| format!(": {cause}"));
            format!("rank {next} is gone{cause}")
        };
        let queue = self.link.queue.as_ref().ok_or_else(|| gone(self.link))?;
        let header = header(self.link.operation, bytes.len()).to_vec();
        queue.send(header).and_then(|()| queue.send(bytes)).map_err(|_| gone(self.link))
    }

    /// So many bytes of the one before.
    fn receive(&mut self, len: usize) -> Result<&[u8], String> {
        let (operation, sent) = self.read_header()?;
        if operation == FAREWELL {
            self.read(sent.min(1 << 16))?;
            return Err(String::from_utf8_lossy(&self.link.buffer).into_owned());
        }
        if (operation, sent) != (self.link.operation, len) {
            return Err(format!(
                "rank {} sends {sent} bytes in operation {operation}, rank {} expects {len} in operation {}: \
                 they do not do the same",
                self.ring.previous(),
                self.ring.rank,
                self.link.operation,
            ));
        }
        self.read(len)?;
        Ok(&self.link.buffer)
    }

    fn read_header(&mut self) -> Result<(u64, usize), String> {
        self.read(HEADER)?;
        let number =
            |bytes: &[u8]| bytes.iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
        let (operation, len) = self.link.buffer.split_at(8);
        Ok((number(operation), usize::try_from(number(len)).unwrap_or(usize::MAX)))
    }

    fn read(&mut self, len: usize) -> Result<(), String> {
        let previous = self.ring.previous();
        let stream = self.link.previous.as_mut().ok_or_else(|| format!("rank {previous} is gone"))?;
        self.link.buffer.resize(len, 0);
        stream.read_exact(&mut self.link.buffer).map_err(|e| match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                format!("rank {previous} did not answer within {} s", self.ring.timeout.as_secs_f64())
            }
            ErrorKind::UnexpectedEof => format!("rank {previous} is gone"),
            _ => format!("rank {previous} is gone: {e}"),
        })
    }
}
