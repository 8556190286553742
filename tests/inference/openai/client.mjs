// OpenAI's own JavaScript client against `serve`: prints one JSON object.
// Arguments: base URL, task, and files in base64 by their names, as JSON.
import OpenAI, { toFile } from 'openai';

const [, , baseURL, task, given] = process.argv;
const files = JSON.parse(given ?? '{}');
const client = new OpenAI({ baseURL, apiKey: 'any', maxRetries: 0 });
const settings = { model: '', seed: 7, num_candidates: 2 };
const asked = { ...settings, prompt: 'a red square' };

async function failure(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    return { name: error.constructor.name, status: error.status, param: error.param, code: error.code };
  }
}

const tasks = {
  async plain() {
    const reply = await client.images.generate({ ...asked, n: 2 });
    return reply.data.map((each) => each.b64_json);
  },
  async streamed() {
    const stream = await client.images.generate({ ...asked, stream: true, partial_images: 3 });
    const events = [];
    for await (const event of stream) events.push({ type: event.type, b64_json: event.b64_json });
    return events;
  },
  async edited() {
    const image = await toFile(Buffer.from(files.image, 'base64'), 'image.png', { type: 'image/png' });
    const mask = await toFile(Buffer.from(files.mask, 'base64'), 'mask.png', { type: 'image/png' });
    const reply = await client.images.edit({ ...asked, image, mask });
    return reply.data.map((each) => each.b64_json);
  },
  async chatted() {
    const messages = [{ role: 'user', content: 'a red square' }];
    const reply = await client.chat.completions.create({ ...settings, messages });
    const urls = reply.choices.flatMap((each) => each.message.content.map((part) => part.image_url.url));
    const stream = await client.chat.completions.create({ ...settings, messages, stream: true });
    for await (const chunk of stream)
      for (const part of chunk.choices[0].delta.content ?? []) urls.push(part.image_url.url);
    return urls;
  },
  async errors() {
    return [
      await failure(client.images.generate({ ...asked, size: '1024x1024' })),
      await failure(client.images.generate({ ...asked, background: 'transparent', stream: true })),
      await failure(client.models.retrieve('gpt-5')),
      await failure(client.images.generate({ ...asked, deadline_seconds: 1e-6 })),
    ];
  },
  async cancelled() {
    const stream = await client.images.generate({
      ...asked, num_candidates: 512, stream: true, partial_images: 3,
    });
    for await (const event of stream) break;
    stream.controller.abort();
    return (await client.models.list()).data.map((each) => each.id);
  },
};

console.log(JSON.stringify(await tasks[task]()));
