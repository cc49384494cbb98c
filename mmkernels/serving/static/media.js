// Pictures and sounds of the user: as parts of a message, small enough to send.

const LONGEST_SIDE = 768;
const RATE = 16000;

export function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${blob.name || "the file"} cannot be read`));
    reader.readAsDataURL(blob);
  });
}

// What the browser can show is sent as PNG, scaled down where it is large.
export async function imagePart(file) {
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "The file"} is no picture that this browser can show.`);
  }
  const scale = Math.min(1, LONGEST_SIDE / Math.max(picture.width, picture.height));
  if (scale === 1 && file.type === "image/png") return { type: "image_url", image_url: { url: await dataUri(file) } };
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return { type: "image_url", image_url: { url: canvas.toDataURL("image/png") } };
}

// What the browser can play is sent as WAV with one channel.
export async function soundPart(file) {
  const bytes = await file.arrayBuffer();
  let sound;
  try {
    sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes);
  } catch {
    throw new Error(`${file.name || "The file"} is no sound that this browser can play.`);
  }
  const mono = new Float32Array(sound.length);
  for (let c = 0; c < sound.numberOfChannels; c++) {
    const channel = sound.getChannelData(c);
    for (let i = 0; i < mono.length; i++) mono[i] += channel[i] / sound.numberOfChannels;
  }
  const uri = await dataUri(new Blob([wav(mono)]));
  return { type: "input_audio", input_audio: { data: uri.slice(uri.indexOf(",") + 1), format: "wav" } };
}

function wav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, word) => [...word].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((s, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, s)) * 32767, true));
  return view.buffer;
}

// Starts to record; the promise that it gives is of a function that stops and gives the recording.
export async function record() {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new Error("This browser lets only pages from localhost or https use the microphone.");
  }
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const recorder = new MediaRecorder(stream);
  const pieces = [];
  recorder.ondataavailable = (event) => pieces.push(event.data);
  recorder.start();
  return () => new Promise((resolve) => {
    recorder.onstop = () => {
      stream.getTracks().forEach((track) => track.stop());
      resolve(new File(pieces, "your recording", { type: recorder.mimeType }));
    };
    recorder.stop();
  });
}
