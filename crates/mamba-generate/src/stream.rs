//! Generation as an asynchronous stream, for any executor.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures_core::Stream;

use crate::cancel::CancelToken;

/// What a thread of its own produces, as a [`Stream`]; see [`spawn_stream`].
///
/// Dropping it stops the thread: its [`cancel_token`](Sender::cancel_token) is cancelled at once, and its next
/// [`send`](Sender::send) says so.
#[derive(Debug)]
pub struct SpawnedStream<T> {
    shared: Arc<Shared<T>>,
    cancel: CancelToken,
}

/// Where the thread of a [`SpawnedStream`] puts what it has.
#[derive(Debug)]
pub struct Sender<T> {
    shared: Arc<Shared<T>>,
    cancel: CancelToken,
}

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<Queue<T>>,
    /// Tells the thread that there is room.
    room: Condvar,
    capacity: usize,
}

#[derive(Debug)]
struct Queue<T> {
    items: VecDeque<T>,
    /// Who waits for an item.
    waker: Option<Waker>,
    /// No more items come.
    ended: bool,
    /// Nobody wants items any more.
    dropped: bool,
}

impl<T> Shared<T> {
    /// The queue is whole at any time, so that a thread which panicked elsewhere does no harm.
    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs `work` on a thread of its own, and streams what it sends; up to `capacity` items wait to be taken.
///
/// Generating a token takes a processor, not a wait, so it must not happen on the threads of an executor. `work` builds a
/// generator and sends its pieces; when nobody wants them any more, [`send`](Sender::send) says so, and the
/// [`CancelToken`] of the sender is cancelled, so that a generation ends even between two sends. The stream ends when `work`
/// returns or panics.
///
/// # Errors
/// If the system gives no thread.
///
/// # Example
/// ```
/// use std::pin::Pin;
/// use std::sync::Arc;
/// use std::task::{Context, Poll, Waker};
///
/// use candle_core::Device;
/// use futures_core::Stream;
/// use mamba_generate::{Generator, Result, spawn_stream};
/// use mamba_model::Model;
/// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
///
/// let config = ModelConfig::uniform(20, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
/// let model = Arc::new(Model::random(&config, 0, &Device::Cpu)?);
/// let mut stream = spawn_stream(8, move |sender| {
///     let tokens = Generator::builder(&*model).prompt(&[3, 1, 4]).max_new_tokens(5).cancel_token(sender.cancel_token());
///     match tokens.build() {
///         Ok(mut tokens) => drop(tokens.try_for_each(|token| sender.send(token))),
///         Err(error) => drop(sender.send(Err(error))),
///     }
/// })?;
///
/// // An executor would wait; here it is asked again and again.
/// let mut ids = Vec::new();
/// loop {
///     match Pin::new(&mut stream).poll_next(&mut Context::from_waker(Waker::noop())) {
///         Poll::Ready(Some(token)) => ids.push(token?.id),
///         Poll::Ready(None) => break,
///         Poll::Pending => std::thread::yield_now(),
///     }
/// }
/// assert_eq!(ids.len(), 5);
/// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
/// ```
pub fn spawn_stream<T: Send + 'static>(
    capacity: usize,
    work: impl FnOnce(&mut Sender<T>) + Send + 'static,
) -> std::io::Result<SpawnedStream<T>> {
    let queue = Queue { items: VecDeque::new(), waker: None, ended: false, dropped: false };
    let shared =
        Arc::new(Shared { state: Mutex::new(queue), room: Condvar::new(), capacity: capacity.max(1) });
    let cancel = CancelToken::new();
    let mut sender = Sender { shared: shared.clone(), cancel: cancel.clone() };
    std::thread::Builder::new().name("generate".into()).spawn(move || work(&mut sender))?;
    Ok(SpawnedStream { shared, cancel })
}

impl<T> Sender<T> {
    /// Hands an item over, and waits while too many were not taken; breaks if nobody wants it.
    pub fn send(&self, item: T) -> ControlFlow<()> {
        let mut queue = self.shared.lock();
        while queue.items.len() >= self.shared.capacity && !queue.dropped {
            queue = self.shared.room.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        if queue.dropped {
            return ControlFlow::Break(());
        }
        queue.items.push_back(item);
        let waker = queue.waker.take();
        drop(queue);
        if let Some(waker) = waker {
            waker.wake();
        }
        ControlFlow::Continue(())
    }

    /// Is cancelled when nobody wants items any more.
    pub fn cancel_token(&self) -> &CancelToken {
        &self.cancel
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        queue.ended = true;
        let waker = queue.waker.take();
        drop(queue);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Stream for SpawnedStream<T> {
    type Item = T;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        let mut queue = self.shared.lock();
        match queue.items.pop_front() {
            Some(item) => {
                self.shared.room.notify_one();
                Poll::Ready(Some(item))
            }
            None if queue.ended => Poll::Ready(None),
            None => {
                queue.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl<T> Drop for SpawnedStream<T> {
    fn drop(&mut self) {
        self.cancel.cancel();
        let mut queue = self.shared.lock();
        queue.dropped = true;
        queue.items.clear();
        self.shared.room.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::task::Wake;

    use super::*;

    /// Wakes by a message.
    struct Bell(mpsc::Sender<()>);

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {
            let _ = self.0.send(());
        }
    }

    fn collect<T>(mut stream: SpawnedStream<T>) -> Vec<T> {
        let (ring, rung) = mpsc::channel();
        let waker = Waker::from(Arc::new(Bell(ring)));
        let mut items = Vec::new();
        loop {
            match Pin::new(&mut stream).poll_next(&mut Context::from_waker(&waker)) {
                Poll::Ready(Some(item)) => items.push(item),
                Poll::Ready(None) => return items,
                // Only woken when there is something: else this would wait for ever.
                Poll::Pending => rung.recv().unwrap(),
            }
        }
    }

    #[test]
    fn every_item_comes_in_order_whatever_the_capacity() {
        for capacity in [0, 1, 3, 1000] {
            let stream = spawn_stream(capacity, |sender| {
                for i in 0..500 {
                    assert!(sender.send(i).is_continue());
                }
            });
            assert_eq!(collect(stream.unwrap()), (0..500).collect::<Vec<_>>());
        }
        assert_eq!(collect(spawn_stream::<u32>(1, |_| {}).unwrap()), [0; 0]);
    }

    #[test]
    fn a_dropped_stream_cancels_a_thread_that_never_sends() {
        let (tell, told) = mpsc::channel();
        let stream = spawn_stream::<()>(1, move |sender| {
            let token = sender.cancel_token().clone();
            let mut rounds = 0u32;
            while !token.is_cancelled() && rounds < 10_000 {
                std::thread::sleep(std::time::Duration::from_millis(1));
                rounds += 1;
            }
            tell.send(token.is_cancelled()).unwrap();
        });
        drop(stream.unwrap());
        assert!(told.recv().unwrap());
    }

    #[test]
    fn a_dropped_stream_stops_the_thread() {
        let (tell, told) = mpsc::channel();
        let stream = spawn_stream(2, move |sender| {
            let token = sender.cancel_token().clone();
            let mut sent = 0u32;
            while sender.send(sent).is_continue() {
                sent += 1;
            }
            tell.send((sent, token.is_cancelled())).unwrap();
        });
        drop(stream.unwrap());
        let (sent, cancelled) = told.recv().unwrap();
        assert!(sent <= 2 && cancelled, "{sent}");
    }
}
